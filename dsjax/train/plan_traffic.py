"""Bytes that a step's collectives move, from the specs alone: which tensors are gathered and reduced, how often.

Counted as in collectives/hlo.py: the whole buffer that a group works on, per device. With G the gradients as a layer
computes them (split over `tensor` only), S those of the layers inside a scan, E the tied embedding, A the accumulation,
x = [b, T, D] one device's activations of a micro-batch, L layers:

  data      the gradients in their ZeRO shards, once, and two scalars: loss and number of tokens
  fsdp      A (G + c E) to reduce gradients, and the two scalars: E's once more in each of the loss's c chunks;
            ZeRO 3: 2 A S + (G - S) to gather weights for the forward and the backward pass (what is not in a scan XLA
            gathers once a step); ZeRO 1 and 2: G to gather the new parameters
  tensor    A x (4 L + 2): after attention and MLP, forward and backward, the embedding, the loss; L more where the
            backward pass computes layers again; A times three [b, T] inside the loss

XLA:CPU widens bfloat16 to float32 in collectives, and adds small ones (norms, indices) that are left out here.
"""

import dataclasses

import jax.numpy as jnp

from dsjax.mesh.layout import ZERO_AXES, Layout
from dsjax.models.config import ModelConfig
from dsjax.train.plan_trace import shard_bytes
from dsjax.train.state import ModelTree

_LOSS_AND_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What crosses one axis in a step, bytes per device."""

    axis: str
    what: str
    bytes: int


def predict_traffic(
    config: ModelConfig, model: ModelTree, layout: Layout, *, rows: int, length: int, accumulation: int, mean: bool
) -> tuple[Traffic, ...]:
    """The collectives of a step.

    Args:
        config: the model.
        model: the model taken apart.
        layout: mesh and ZeRO stage.
        rows: of one micro-batch on one device (b).
        length: tokens in a row (T).
        accumulation: micro-batches in a step (A).
        mean: whether gradients are averaged over `data` before the optimizer sees them.
    """
    sizes = dict(layout.mesh.shape)
    found = []
    if sizes["data"] > 1 and mean:
        gradients = shard_bytes(model.shapes, model.specs(layout.gradient), sizes)
        found.append(Traffic("data", "reduce gradients, once a step", gradients + _LOSS_AND_TOKENS))
    if layout.size(ZERO_AXES) > 1:
        found += _zero(config, model, layout, sizes, accumulation)
    if sizes["tensor"] > 1:
        itemsize = jnp.dtype(config.compute_dtype).itemsize
        again = config.num_layers if config.remat == "full" else 0
        activations = rows * length * config.model_dim * itemsize
        moved = accumulation * (activations * (4 * config.num_layers + 2 + again) + 3 * rows * length * 4)
        found.append(Traffic("tensor", "sum activations, every layer", moved))
    return tuple(found)


def _zero(
    config: ModelConfig, model: ModelTree, layout: Layout, sizes: dict[str, int], accumulation: int
) -> list[Traffic]:
    """What crosses the axes of ZeRO."""
    axis = "+".join(a for a in ZERO_AXES if sizes[a] > 1)
    gathered = model.specs(layout.gathered)
    whole = shard_bytes(model.shapes, gathered, sizes)
    part = lambda *path: shard_bytes(_at(model.shapes, path), _at(gathered, path), sizes)
    table = part("embed", "table")  # its two uses, for tokens and for logits, are reduced apart
    found = [Traffic(axis, "reduce gradients, every micro-batch", accumulation * (whole + table) + _LOSS_AND_TOKENS)]
    if layout.zero_stage == 3:
        scanned = sum(part("segments", i) for i, length in enumerate(config.layer_runs) if length > 1)
        itemsize = jnp.dtype(config.compute_dtype).itemsize
        moved = (2 * accumulation * scanned + whole - scanned) * itemsize // 4
        found.append(Traffic(axis, "gather weights, forward and backward", moved))
    elif layout.zero_stage:
        found.append(Traffic(axis, "gather the new parameters", whole))
    return found


def _at(tree, path: tuple):
    for key in path:
        tree = tree[key]
    return tree
