"""Bytes that cross `data` over a whole run, stage by stage: the point of compressed communication.

With g the bytes of a device's gradients (float32, in the optimizer's shards), N its values padded to 8 W for each
tensor, R its tensors (layers of a stack one by one) and W workers, a step's messages are

  full          an all-reduce of g
  compressed    an all-to-all and an all-gather of M = N/8 + 4 R W bytes each (between two workers all-reduces of M/2),
                and an all-gather of two scalars (8 W)
  sync          the same two, and an all-reduce of two scalars
  local         none

Beside them loss and number of tokens (8 bytes) wherever workers talk about gradients. Of a buffer of b bytes a device
sends b (W - 1) / W, in an all-reduce twice that.
"""

import dataclasses
import math

import jax

from dsjax.mesh.layout import Layout
from dsjax.optimizers.api import Tree
from dsjax.plan.trace import shard_bytes
from dsjax.setup.assembly import Setup

_LOSS_AND_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One stage of an optimizer.

    Attributes:
        stage: its name.
        steps: steps of the run in it.
        buffers: bytes of a step's buffers over `data` on one device, as collectives/hlo.py counts them.
        sent: bytes that one device sends over `data` in a step.
    """

    stage: str
    steps: int
    buffers: int
    sent: int


def predict_rounds(setup: Setup) -> tuple[Round, ...]:
    """The stages of a run, in the order in which it first enters them; none with one worker."""
    model, optimizer, layout = setup.model, setup.optimizer, setup.layout
    workers = layout.mesh.shape["data"]
    if workers == 1:
        return ()
    mean = optimizer.gradients == "mean"
    specs = model.specs(layout.gradient if mean else layout.optimizer)
    gradients = shard_bytes(model.shapes, specs, dict(layout.mesh.shape))
    rounds = []
    message = 0 if mean else _message(setup.shapes.opt_state, layout, workers)
    # Bytes of buffers that are exchanged or gathered, and of those that are reduced.
    bits = (0, message) if workers == 2 else (2 * message, 0)
    for stage, count in optimizer.rounds(setup.schedule.num_steps).items():
        if stage in optimizer.no_collectives:
            buffers = reduced = 0
        elif stage in optimizer.local:
            buffers, reduced = bits[0], bits[1] + 8
        elif optimizer.kinds[stage] == "full":
            buffers, reduced = 0, gradients + _LOSS_AND_TOKENS
        else:
            buffers, reduced = bits[0] + 8 * workers, bits[1] + _LOSS_AND_TOKENS
        sent = round((workers - 1) / workers * (buffers + 2 * reduced))
        rounds.append(Round(stage=stage, steps=count, buffers=buffers + reduced, sent=sent))
    return tuple(rounds)


def _message(opt_state: Tree, layout: Layout, workers: int) -> int:
    """Bytes of one device's message in a phase of the one-bit mean: bits and scales, to all workers together."""
    devices = math.prod(layout.mesh.shape.values())
    values = sum(math.prod(x.shape) for x in jax.tree.leaves(opt_state.feedback.worker)) // devices
    scales = sum(math.prod(x.shape) for x in jax.tree.leaves(opt_state.feedback.worker_scale)) // workers
    return values // 8 + 4 * scales * workers
