"""Record runs of DeepSpeed 0.19.6's 1-bit optimizers and of their compressed all-reduce, on CPU with gloo.

    python record_optimizers.py FOLDER [CASE ...]

The keys of the files are in ../optimizers/README.md. DeepSpeed needs two shims on CPU: its accelerator has no bit
packer, and gloo refuses to gather a 0-dimensional tensor into one of shape (1,).
"""

import argparse
import json
import os
import tempfile
import types
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import numpy as np
import torch
import torch.multiprocessing
from deepspeed.runtime.comm import compressed
from deepspeed.runtime.fp16.onebit.adam import OnebitAdam
from deepspeed.runtime.fp16.onebit.lamb import OnebitLamb
from deepspeed.runtime.fp16.onebit.zoadam import ZeroOneAdam

SHAPES = [[7, 5], [13], [4, 16], [3]]
SMALL = [[7, 5], [3]]
FLAT = [[119]]  # the wrappers for half precision ravel a group of parameters into one tensor
ADAM = {"freeze_step": 9, "weight_decay": 0.01}
LAMB = {"freeze_step": 10, "weight_decay": 0.01, "max_coeff": 0.3, "min_coeff": 0.01}
LOOSE = {"freeze_step": 6, "factor_threshold": 0.5, "coeff_beta": 0.6}
ZERO_ONE = {"var_freeze_step": 20, "var_update_scaler": 3, "local_step_scaler": 6, "local_step_clipper": 4}
SHORT = {"var_freeze_step": 12, "var_update_scaler": 2, "local_step_scaler": 4, "local_step_clipper": 4}
RARE = {"var_freeze_step": 100, "var_update_scaler": 3}
RUNS = {
    "adam_w1": {"opt": "adam", "world": 1, "steps": 16, "lr_warm": 5, "shapes": SMALL, "kw": ADAM},
    "adam_w3": {"opt": "adam", "world": 3, "steps": 20, "lr_warm": 5, "kw": ADAM},
    "adam_w4": {"opt": "adam", "world": 4, "steps": 20, "lr_warm": 5, "shapes": SMALL, "kw": ADAM},
    "adam_w2_nomask": {"opt": "adam", "world": 2, "steps": 24, "zero_rows": 4, "kw": {"freeze_step": 9}},
    "adam_w2_flat": {"opt": "adam", "world": 2, "steps": 24, "init_step": 1, "shapes": FLAT, "kw": ADAM},
    "lamb_w1": {"opt": "lamb", "world": 1, "steps": 20, "kw": LAMB},
    "lamb_w3": {"opt": "lamb", "world": 3, "steps": 18, "lr_warm": 4, "shapes": SMALL, "kw": LAMB},
    "lamb_w4": {"opt": "lamb", "world": 4, "steps": 28, "lr_warm": 4, "kw": LAMB},
    "lamb_w2_mask": {"opt": "lamb", "world": 2, "steps": 28, "zero_rows": 4, "mask": 1, "kw": LAMB},
    "lamb_w2_loose": {"opt": "lamb", "world": 2, "steps": 28, "kw": LOOSE},
    "zoadam_w1": {"opt": "zoadam", "world": 1, "steps": 26, "shapes": SMALL, "kw": SHORT},
    "zoadam_w3": {"opt": "zoadam", "world": 3, "steps": 26, "shapes": SMALL, "kw": SHORT},
    "zoadam_w4": {"opt": "zoadam", "world": 4, "steps": 48, "lr_warm": 8, "kw": ZERO_ONE | {"weight_decay": 0.01}},
    "zoadam_w2_mask": {"opt": "zoadam", "world": 2, "steps": 48, "zero_rows": 4, "mask": 1, "kw": ZERO_ONE},
    "zoadam_w2_nofreeze": {"opt": "zoadam", "world": 2, "steps": 40, "kw": RARE},
    "zoadam_w2_flat": {"opt": "zoadam", "world": 2, "steps": 48, "init_step": 1, "shapes": FLAT, "kw": ZERO_ONE},
}
COLLECTIVES = {"op_w3": 3, "op_w4": 4}
CLASSES = {"adam": OnebitAdam, "lamb": OnebitLamb, "zoadam": ZeroOneAdam}
BY_PARAMETER = {
    "adam": ("worker_error", "server_error"),
    "lamb": ("scaling_coeff", "lamb_coeff_freeze", "last_factor", "exp_avg_sq_fresh"),
    "zoadam": (
        *("worker_error", "server_error", "momentum_accumulator", "lrs"),
        *("var_interval", "var_counter", "local_step_interval", "local_step_counter"),
    ),
}


class Packer:
    """What the accelerator's builder of a bit packer would load."""

    def load(self):
        return self

    def packbits(self, buffer, size, rank):
        return torch.from_numpy(np.packbits(~(buffer.numpy() < 0)))

    def unpackbits(self, buffer, size, rank):
        return torch.from_numpy(2.0 * np.unpackbits(buffer.numpy().astype(np.uint8)).astype(np.float32) - 1)


def join(rank: int, world: int, meeting: str) -> None:
    """Set up gloo and both shims in this process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    compressed.PackbitsBuilder = Packer
    gather = compressed.dist.all_gather
    compressed.dist.all_gather = lambda outs, x, group=None: gather(outs, x.reshape(outs[0].shape), group=group)


def inputs(case: dict) -> dict[str, np.ndarray]:
    """First parameters, gradients of all workers and learning rates: a drifting direction that workers share, noise."""
    rng = np.random.default_rng(case["seed"])
    steps, world = case["steps"], case["world"]
    found = {"lr": case["lr"] * np.minimum(1, np.arange(1, steps + 1) / case.get("lr_warm", 1))}
    for k, shape in enumerate(case["shapes"]):
        found[f"init{k}"] = rng.standard_normal(shape).astype(np.float32)
        shared = rng.standard_normal(shape) + 0.3 * np.cumsum(rng.standard_normal((steps, *shape)), axis=0)
        gradient = 0.3 * (shared + rng.standard_normal((world, steps, *shape))) * 4.0 ** rng.uniform(-1, 1)
        if k == 0 and "zero_rows" in case:
            gradient[:, :, case["zero_rows"] :] = 0
        found[f"grad{k}"] = gradient.astype(np.float32)
    return found


def snapshot(optimizer, tensors: list, kind: str, t: int) -> dict[str, np.ndarray]:
    """All that is recorded of this worker after step t."""
    found = {}
    copy = lambda x: x.detach().numpy().copy() if torch.is_tensor(x) else np.float64(x)
    for k, p in enumerate(tensors):
        state = optimizer.state[p]
        found |= {f"param{k}": copy(p), f"m{k}": copy(state["exp_avg"]), f"v{k}": copy(state["exp_avg_sq"])}
        found |= {f"{name}{k}@{t}": copy(state[name]) for name in BY_PARAMETER[kind] if name in state}
    if kind == "lamb":
        coefficients = [float(c) for c in optimizer.get_lamb_coeffs()]
        found["lamb_coeffs"] = np.array(coefficients or [np.nan] * len(tensors))
        found[f"exp_avg_flat@{t}"] = copy(optimizer.exp_avg_flat[0])
        if optimizer.worker_errors:
            found[f"worker_error_flat@{t}"] = copy(optimizer.worker_errors[0])
            found[f"server_error_flat@{t}"] = copy(optimizer.server_errors[0])
    return found


def run_worker(rank: int, case: dict, folder: str) -> None:
    join(rank, case["world"], f"{folder}/meeting")
    given = inputs(case)
    tensors = [torch.nn.Parameter(torch.tensor(given[f"init{k}"])) for k in range(len(case["shapes"]))]
    groups = [{"params": tensors}]
    if case.get("mask"):
        groups = [{"params": tensors[:1]}, {"params": tensors[1:]}]
        groups[0]["exp_avg_mask"] = torch.ones(case["shapes"][0])
        groups[0]["exp_avg_mask"][case["zero_rows"] :] = 0
    engine = types.SimpleNamespace(mpu=None, local_rank=rank, enable_backward_allreduce=True)
    kind = case["opt"]
    optimizer = CLASSES[kind](groups, deepspeed=engine, lr=case["lr"], comm_backend_name="compressed", **case["kw"])
    if case.get("init_step"):
        for p in tensors:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    rows, once = [], {}
    for t in range(case["steps"]):
        flag = engine.enable_backward_allreduce
        for k, p in enumerate(tensors):
            gradient = given[f"grad{k}"][:, t]
            p.grad = torch.tensor(gradient.mean(axis=0) if flag else gradient[rank])
        for group in optimizer.param_groups:
            group["lr"] = float(given["lr"][t])
        optimizer.step()
        state = snapshot(optimizer, tensors, kind, t)
        frozen = optimizer.freeze_key if kind == "zoadam" else vars(optimizer)[f"{kind}_freeze_key"]
        row = {"flag": int(flag), "step": optimizer.state[tensors[0]]["step"], "frozen_after": int(frozen)}
        rows.append(row | {name: value for name, value in state.items() if "@" not in name})
        once |= {name: value for name, value in state.items() if "@" in name}
    once |= {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    np.savez(f"{folder}/{rank}.npz", **once)


def record_run(name: str, case: dict, out: Path) -> None:
    """Run all workers and put what they recorded into one file."""
    case = {"seed": 100 + list(RUNS).index(name), "lr": 0.01, "shapes": SHAPES} | case
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_worker, (case, folder), nprocs=case["world"])
        workers = [dict(np.load(f"{folder}/{rank}.npz")) for rank in range(case["world"])]
    record = {}
    for key, first in workers[0].items():
        values = [worker[key] for worker in workers]
        by_step = "@" not in key
        if first.ndim <= by_step or key == "lamb_coeffs":  # a number: the same everywhere
            assert all(np.array_equal(value, first, equal_nan=True) for value in values), key
            record[key] = first
        else:
            record[key] = np.stack(values, axis=int(by_step))
    np.savez_compressed(out / f"{name}.npz", **record, **inputs(case), case=json.dumps(case))


def run_collective(rank: int, world: int, folder: str) -> None:
    join(rank, world, f"{folder}/meeting")
    backend = compressed.CompressedBackend(None)
    rng = np.random.default_rng(world)
    found = {}

    def average(x, worker_error, server_error):
        return backend.compressed_allreduce(torch.tensor(x), worker_error, server_error, rank).numpy().copy()

    def errors(n: int):
        size = -(-n // (world * np.lcm(world, 8))) * world * np.lcm(world, 8)
        return torch.zeros(int(size)), torch.zeros(int(size // world))

    for n in (35, 64, 100, 300):
        x = (rng.standard_normal((6, world, n)) * 10.0 ** np.linspace(-2, 2, 6)[:, None, None]).astype(np.float32)
        worker_error, server_error = errors(n)
        rows = {f"{key}_{n}": [] for key in ("x", "y", "we", "se")}
        for r in range(len(x)):
            y = average(x[r, rank], worker_error, server_error)
            for row, value in zip(rows.values(), (x[r, rank], y, worker_error, server_error), strict=True):
                row.append(np.array(value))
        found |= {key: np.stack(row) for key, row in rows.items()}
    for name, value in {"nan": np.nan, "inf": np.inf, "big": 1e30, "zero": 0}.items():
        x = np.full(64, 0 if name == "zero" else 1, np.float32)
        if rank == 0:
            x[5] = value
        worker_error, server_error = errors(64)
        found[f"sp_{name}_y"] = average(x, worker_error, server_error)
        found |= {f"sp_{name}_we": worker_error.numpy(), f"sp_{name}_se": server_error.numpy()}
    np.savez(f"{folder}/{rank}.npz", **found)


def record_collective(name: str, world: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_collective, (world, folder), nprocs=world)
        workers = [dict(np.load(f"{folder}/{rank}.npz")) for rank in range(world)]
    stacked = {
        key: np.stack([worker[key] for worker in workers], axis=0 if key.startswith("sp_") else 1) for key in workers[0]
    }
    np.savez_compressed(out / f"{name}.npz", **stacked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", choices=[[], *RUNS, *COLLECTIVES], help="default: all")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.cases or [*RUNS, *COLLECTIVES]:
        if name in RUNS:
            record_run(name, RUNS[name], given.folder)
        else:
            record_collective(name, COLLECTIVES[name], given.folder)
        print(given.folder / f"{name}.npz", flush=True)


if __name__ == "__main__":
    main()
