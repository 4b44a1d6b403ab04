"""Reads the recordings that optimizers/README.md describes, from the folder DSJAX_GOLDEN_OPTIMIZERS or that one."""

import functools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TOLERANCE, TOLERANCE_ALONE = 1e-5, 1e-4
# Of errors, as a share of the scale of what was compressed. The oracle's worst is 1.1e-6 in runs, and 1.8e-6 in the
# collective alone, where rounds inherit the rounding of ones six times as large.
TOLERANCE_OF_ERRORS = 5e-6
ERRORS = ("worker_error", "server_error", "worker_error_flat", "server_error_flat")
WITHOUT_EFFECT = ("bias_correction", "eps_inside_sqrt", "max_grad_norm", "cuda_aware", "comm_backend_name")
FOLDER = Path(os.environ.get("DSJAX_GOLDEN_OPTIMIZERS", Path(__file__).parent / "optimizers"))


def _paths(collective: bool) -> list[Path]:
    paths = [path for path in sorted(FOLDER.glob("*.npz")) if path.stem.startswith("op_") == collective]
    if not paths:
        raise ValueError(f"DSJAX_GOLDEN_OPTIMIZERS: no recording of this kind (*.npz) in {FOLDER}")
    return paths


def runs() -> list[Path]:
    """Recorded runs of an optimizer."""
    return _paths(False)


def collectives() -> list[Path]:
    """Recordings of the all-reduce alone."""
    return _paths(True)


@functools.cache
def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    with np.load(path) as file:
        return dict(file)


def assert_near(actual, recorded, what: str, tolerance: float = TOLERANCE, largest: float | None = None) -> None:
    """Equal to a share of the recorded tensor's largest value, or of `largest`."""
    actual, recorded = np.asarray(actual), np.asarray(recorded)
    assert actual.shape == recorded.shape, f"{what}: shape {actual.shape}, recorded {recorded.shape}"
    worst = np.abs(actual.astype(np.float64) - recorded).max(initial=0)
    largest = np.abs(recorded).max(initial=0) if largest is None else largest
    assert worst <= tolerance * largest, f"{what}: off by {worst} of {largest}"


class Run:
    """One recorded run. Tensors are those that the optimizer was given: one, where a group was raveled into one."""

    def __init__(self, path: Path):
        self.record = load(path)
        case = json.loads(str(self.record["case"]))
        self.kind: str = case["opt"]
        self.workers: int = case["world"]
        self.arguments: dict = {name: value for name, value in case["kw"].items() if name not in WITHOUT_EFFECT}
        if "betas" in self.arguments:
            self.arguments["b1"], self.arguments["b2"] = self.arguments.pop("betas")
        self.lost_before = bool(case.get("init_step", 0))
        self.lr = [float(x) for x in self.record["lr"]]
        self.steps = len(self.lr)
        self.step = self.record["step"]
        self.flag = self.record["flag"].astype(bool)
        self.frozen_after = self.record["frozen_after"].astype(bool)
        self.coefficients = self.record.get("lamb_coeffs")
        self.num_tensors = sum(re.fullmatch(r"param\d+", name) is not None for name in self.record)
        self._gradients = self._of_the_optimizer("grad", leading=2)
        self.params = self._of_the_optimizer("init", leading=0)
        self.masks: list[np.ndarray] | None = None
        if case.get("mask"):
            self.masks = [np.any(g != 0, axis=(0, 1)) for g in self._gradients]

    def _of_the_optimizer(self, name: str, leading: int) -> list[np.ndarray]:
        """Inputs per tensor of the optimizer: raveled into one if they were recorded by the tensor."""
        count = sum(re.fullmatch(rf"{name}\d+", key) is not None for key in self.record)
        tensors = [self.record[f"{name}{k}"] for k in range(count)]
        if count == self.num_tensors:
            return tensors
        assert self.num_tensors == 1, f"{count} tensors named {name}, {self.num_tensors} of the optimizer"
        flat = [x.reshape(*x.shape[:leading], math.prod(x.shape[leading:])) for x in tensors]
        return [np.concatenate(flat, axis=-1)]

    def gradients(self, t: int) -> list[np.ndarray]:
        """Every worker's gradients at a step, [W, ...]."""
        return [g[:, t] for g in self._gradients]

    def all_gradients(self, k: int) -> np.ndarray:
        """Every worker's gradients of a tensor at all steps, [W, T, ...]."""
        return self._gradients[k]

    def recorded(self, t: int) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(name, number of the tensor or None, value) of all that was recorded after step t."""
        for k in range(self.num_tensors):
            for name in ("param", "m", "v"):
                yield name, k, self.record[f"{name}{k}"][t]
        for key, value in self.record.items():
            match = re.fullmatch(rf"([a-z_]+?)(\d*)@{t}", key)
            if match:
                yield match[1], int(match[2]) if match[2] else None, value
