"""One process of the collective's benchmark: DeepSpeed 0.19.6's compressed all-reduce and torch's float32, over gloo.

DeepSpeed needs two shims on a CPU: its accelerator has no packer of bits (numpy's does it), and gloo does not gather a
0-dimensional tensor into one of shape (1,). Runs in a Python of its own; of ours it only imports files without JAX.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from deepspeed.runtime.comm import compressed  # pyright: ignore[reportMissingImports]
from network import own_counters
from side_by_side import serve_and_leave


class Packer:
    """Stand-in for the packer that the accelerator's builder would load: numpy's bits, most significant first."""

    def load(self) -> "Packer":
        return self

    def packbits(self, buffer: Any, size: int, rank: int) -> Any:
        return torch.from_numpy(np.packbits(buffer.numpy() >= 0))

    def unpackbits(self, buffer: Any, size: int, rank: int) -> Any:
        signs = np.unpackbits(buffer.numpy()).astype(np.float32)
        signs *= 2
        signs -= 1
        return torch.from_numpy(signs)


class Bench:
    """x of N values in each process; each call replaces it by the mean (or sum) of all, in place."""

    def __init__(self, values: int, seed: int) -> None:
        self.values, self.seed = values, seed
        self.rank, self.num_workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        compressed.PackbitsBuilder = Packer
        gather = compressed.dist.all_gather
        compressed.dist.all_gather = lambda outs, x, group=None: gather(outs, x.reshape(outs[0].shape), group=group)
        self.backend = compressed.CompressedBackend(None)

    def row(self, number: int, values: int) -> Any:
        """As in collective_jax.py."""
        rng = np.random.default_rng((self.seed, number, self.rank))
        return torch.from_numpy(rng.standard_normal(values, np.float32))

    def errors(self, values: int) -> tuple[Any, Any]:
        """The worker's and the server's at first."""
        unit = self.num_workers * int(np.lcm(self.num_workers, 8))
        padded = -(-values // unit) * unit
        return torch.zeros(padded), torch.zeros(padded // self.num_workers)

    def calls(self, name: str, calls: int) -> dict[str, Any]:
        """Seconds of each call, and what the interface sent and received in all of them."""
        x, errors = self.row(0, self.values), self.errors(self.values)
        call = {
            "deepspeed": lambda: self.backend.compressed_allreduce(x, *errors, self.rank),
            "torch float32": lambda: torch.distributed.all_reduce(x),
        }[name]
        call()
        before, seconds = own_counters(), []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        moved = own_counters() - before
        return {"calls": seconds, "sent": moved.sent, "received": moved.received}

    def results(self, values: int, rounds: int, path: str) -> dict[str, Any]:
        """Means of the inputs 0, 1, ..., one after the other."""
        errors, means = self.errors(values), []
        for number in range(rounds):
            mean = self.backend.compressed_allreduce(self.row(number, values), *errors, self.rank)
            means.append(mean.numpy().copy())
        np.save(f"{path}-{self.rank}.npy", np.stack(means))
        return {}

    def about(self) -> dict[str, Any]:
        return {"versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__}}


def load(values: int, seed: int) -> Mapping[str, Callable[..., dict[str, Any]]]:
    bench = Bench(values, seed)
    return {"about": bench.about, "calls": bench.calls, "results": bench.results}


if __name__ == "__main__":
    serve_and_leave(load)
