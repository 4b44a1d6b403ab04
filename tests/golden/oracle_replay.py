"""The numpy oracle on what was recorded, step by step, and how large what it compressed was."""

from collections.abc import Iterator, Mapping

import numpy as np
import optimizer_recordings as recordings
from one_bit_oracle import PEER, AllReduce, OneBitAdam, OneBitLamb, ZeroOneAdam

OPTIMIZERS = {"adam": OneBitAdam, "lamb": OneBitLamb, "zoadam": ZeroOneAdam}

type Oracle = OneBitAdam | OneBitLamb | ZeroOneAdam


def replay(run: recordings.Run) -> Iterator[tuple[Oracle, str]]:
    """The optimizer after each recorded step, and what kind of step it was; always the same object, which goes on."""
    optimizer = OPTIMIZERS[run.kind](run.params, num_workers=run.workers, masks=run.masks, rules=PEER, **run.arguments)
    if run.lost_before:
        assert optimizer.step([np.zeros_like(g) for g in run.gradients(0)], lr=run.lr[0]) == "noop"
    for t in range(run.steps):
        yield optimizer, optimizer.step(run.gradients(t), lr=run.lr[t])


def scale_of_compressed(optimizer: Oracle, name: str, k: int | None) -> float:
    """The scale of the tensor of which a recorded error is what its last compression left over.

    An error may be nothing but rounding (values that are all of one size leave none), and then says nothing of itself.
    """
    buffer = optimizer.average if k is None else optimizer.average.buffers[k]
    return buffer.worker_scale if name.startswith("worker") else buffer.server_scale


def replay_collective(record: Mapping[str, np.ndarray], n: int) -> Iterator[tuple[AllReduce, np.ndarray]]:
    """The all-reduce of n values after each recorded round, and its result; always the same object."""
    rounds, workers, _ = record[f"x_{n}"].shape
    average = AllReduce(n, workers, PEER)
    for r in range(rounds):
        yield average, average(record[f"x_{n}"][r])
