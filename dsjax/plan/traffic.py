"""Bytes that a step's collectives move, from the specs alone: which tensors are gathered and reduced, how often.

Counted as in collectives/hlo.py: the whole buffer that a group works on, per device. With G the gradients as a layer
computes them (split over `tensor` only), S those of the layers inside a scan, E the tied embedding, A the accumulation,
x = [b, T, D] one device's activations of a micro-batch, L layers:

  data      the gradients in their ZeRO shards, once, and two scalars: loss and number of tokens
  fsdp      A (G + c E) to reduce gradients, and the two scalars: E's once more in each of the loss's c chunks;
            ZeRO 3: 2 A S + (G - S) to gather weights for the forward and the backward pass (what is not in a scan XLA
            gathers once a step); ZeRO 1 and 2: G to gather the new parameters
  tensor    A x (2 + L (2 + p)): the embedding, the loss, in each layer after attention and MLP, and backward before the
            p projections that read the same input (2 if q, k and v are one and the MLP has no gate, else each counts;
            of keys and values that stay whole, the gradients of their G heads instead of x); L more where the backward
            pass computes layers again, 2 L if norms come after the residuals; A times three [b, T] inside the loss

With adapters (lora) only what is trained is reduced, but all is gathered. What XLA then finds not to be needed, such as
gradients below the first adapter, or has to sum for the adapters is not counted. Seen with models 64 wide: `tensor` 8%
too low to 6% too high, ZeRO 3 without remat 31% and 37% too high; `data`, ZeRO 2 and ZeRO 3 with remat exact.

XLA:CPU widens bfloat16 to float32 in collectives, and adds small ones (norms, indices) that are left out here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsjax.mesh.layout import ZERO_AXES
from dsjax.models.families.family import architecture_of
from dsjax.models.tree import joined
from dsjax.plan.trace import shard_bytes
from dsjax.setup.assembly import Setup

_LOSS_AND_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes per device that cross one axis in a step."""

    axis: str
    what: str
    bytes: int


def predict_traffic(setup: Setup, *, rows: int) -> tuple[Traffic, ...]:
    """The collectives of a step.

    Args:
        setup: the run.
        rows: of one micro-batch on one device (b).
    """
    config, model, layout = setup.config.model, setup.model, setup.layout
    length, accumulation = setup.config.data.sequence_length, setup.config.train.accumulation
    sizes = dict(layout.mesh.shape)
    found = []
    if sizes["data"] > 1 and setup.optimizer.gradients == "mean":
        gradients = shard_bytes(model.shapes, model.specs(layout.gradient), sizes)
        found.append(Traffic("data", "reduce gradients, once a step", gradients + _LOSS_AND_TOKENS))
    if layout.size(ZERO_AXES) > 1:
        found += _zero(setup)
    if sizes["tensor"] > 1:
        itemsize = jnp.dtype(config.compute_dtype).itemsize
        architecture = architecture_of(config)
        activations = rows * length * architecture.model_dim * itemsize
        sums = architecture.sums_over_tensor(layout, remat=config.remat)
        moved = round(accumulation * (activations * sums + 3 * rows * length * 4))
        found.append(Traffic("tensor", "sum activations, every layer", moved))
    return tuple(found)


def _zero(setup: Setup) -> list[Traffic]:
    """Bytes that cross the axes of ZeRO."""
    config, model, frozen, layout = setup.config.model, setup.model, setup.frozen, setup.layout
    sizes, accumulation = dict(layout.mesh.shape), setup.config.train.accumulation
    axis = "+".join(a for a in ZERO_AXES if sizes[a] > 1)
    gathered = model.specs(layout.gathered)
    whole = shard_bytes(model.shapes, gathered, sizes)
    # The two uses of a tied table, for tokens and for logits, are reduced apart.
    tied = frozen is None and architecture_of(config).tied
    table = shard_bytes(model.shapes["embed"]["table"], gathered["embed"]["table"], sizes) if tied else 0
    found = [Traffic(axis, "reduce gradients, every micro-batch", accumulation * (whole + table) + _LOSS_AND_TOKENS)]
    if layout.zero_stage == 3:
        shapes, specs = model.shapes, gathered
        if frozen is not None:
            shapes, specs = joined(shapes, frozen.shapes), joined(specs, frozen.specs(layout.gathered))
        # Each travels in the smaller of its type and the computation's (`use` of layers/parameter.py).
        compute = jnp.dtype(config.compute_dtype)
        travels = lambda x: jax.ShapeDtypeStruct(x.shape, min(x.dtype, compute, key=lambda dtype: dtype.itemsize))
        shapes = jax.tree.map(travels, shapes)
        both = shard_bytes(shapes, specs, sizes)
        part = lambda i: shard_bytes(shapes["segments"][i], specs["segments"][i], sizes)
        scanned = sum(part(i) for i, segment in enumerate(model.segments) if segment.repeats > 1)
        moved = 2 * accumulation * scanned + both - scanned
        found.append(Traffic(axis, "gather weights, forward and backward", moved))
    elif layout.zero_stage:
        found.append(Traffic(axis, "gather the new parameters", whole))
    return found
