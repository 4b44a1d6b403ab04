"""Does what is compiled of sign_pack for an H200 compute what it should? Compiled and run here, without one.

    .venv/bin/python experiments/sign_pack_without_gpu/run.py          results/h200.json and the table in README.md
    .venv/bin/python experiments/sign_pack_without_gpu/run.py --dry    prints the table, writes nothing

The first run installs JAX's CUDA plugin and NVIDIA's assembler (1.3 GB) into an environment of its own under .cache/.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import ptx  # noqa: E402
from side_by_side import machine, write_between_marks  # noqa: E402

from pallas_kernels.sign_pack import shapes  # noqa: E402

ENVIRONMENT = ROOT / ".cache" / "sign_pack_without_gpu" / "venv"
EPSILON = 2.0**-24  # a float32 rounding


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel; `size` values in each of `tensors` tensors."""

    op: str
    tensors: int
    size: int
    dtype: str = "float32"
    masked: bool = False
    length: int | None = None
    workers: int = 0

    @property
    def name(self) -> str:
        given = f"W {self.workers}" if self.workers else self.dtype
        options = [given, *["mask"] * self.masked, *[f"length {self.length}"] * (self.length is not None)]
        return f"{self.op} [{self.tensors}, {self.size}] {', '.join(options)}"


CASES = [
    Case("sign_pack", 1, 512),
    Case("sign_pack", 3, 1536, masked=True, length=1001),
    Case("sign_pack", 2, 67584),
    Case("sign_pack", 2, 67584, dtype="bfloat16"),
    Case("sign_pack", 2, 2**18, dtype="bfloat16", masked=True, length=2**18 - 300),
    Case("unpack_average", 1, 512, workers=1),
    Case("unpack_average", 2, 67584, workers=2),
    Case("unpack_average", 3, 4608, workers=8, masked=True),
    Case("unpack_average", 2, 2048, workers=9, length=2000),
    Case("unpack_average", 2, 2**17, workers=64),
]


def environment() -> Path:
    """The Python that can compile for CUDA, made on the first call."""
    jax_version = version("jax")
    names = ["jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt"]
    packages = [*(f"{name}=={jax_version}" for name in names), "nvidia-cuda-nvcc>=13,<14", "jaxtyping"]
    done = ENVIRONMENT / "installed"
    if not done.exists() or done.read_text() != "\n".join(packages):
        print(f"installing {', '.join(packages)} into {ENVIRONMENT} (once)", flush=True)
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        subprocess.run([ENVIRONMENT / "bin/python", "-m", "pip", "install", "-qq", *packages], check=True)
        done.write_text("\n".join(packages))
    return ENVIRONMENT / "bin" / "python"


def compiled(python: Path) -> dict[str, str]:
    """The PTX of every case, by its name."""
    done = subprocess.run(
        [python, HERE / "compile.py"],
        input=json.dumps([dataclasses.asdict(case) | {"name": case.name} for case in CASES]),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=500,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"compiling failed:\n{done.stderr[-3000:]}")
    parts = done.stdout.split("\n== ") if done.stdout.startswith("== ") else ("\n" + done.stdout).split("\n== ")[1:]
    texts = [part.removeprefix("== ").partition("\n") for part in parts]
    return {name: text[text.index(".version") : text.index("\n}") + 3] for name, _, text in texts}


def assembled(assembler: Path, text: str) -> dict[str, int]:
    """Report of NVIDIA's assembler, and how many of a multiprocessor's 64 warps fit into its registers."""
    source, target = ENVIRONMENT / "kernel.ptx", ENVIRONMENT / "kernel.cubin"
    source.write_text(text)
    command = [assembler, "-arch=sm_90a", "-v", source, "-o", target]
    said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    blocks = 65536 // (128 * 8 * math.ceil(registers / 8))
    return {"registers": registers, "spilled_bytes": spilled, "warps": min(64, 4 * blocks)}


def emulated(case: Case, text: str) -> dict[str, float | int]:
    """The kernel in numpy on random numbers, against the definition in float64."""
    rng = np.random.default_rng(case.size)
    shape, tile = (case.tensors, case.size), shapes.tiling((case.tensors, case.size))
    mask = (rng.random(shape) < 0.7).astype(np.int8) if case.masked else None
    kept = np.arange(case.size) < (case.size if case.length is None else case.length)
    kept = kept & (np.ones(shape, bool) if mask is None else mask.astype(bool))
    before = np.where(kept, rng.standard_normal(shape), 0).astype(np.float32)
    scale = np.abs(rng.standard_normal(case.tensors)).astype(np.float32)
    if case.op == "sign_pack":
        inputs = [np.array(jax.numpy.asarray(rng.standard_normal(shape), case.dtype))]
        x = inputs[0].astype(np.float64)
        summands = np.abs(x)
    else:
        packed = rng.integers(0, 256, (case.workers, case.tensors, case.size // 8), np.uint8)
        shares = np.abs(rng.standard_normal((case.workers, case.tensors))).astype(np.float32)
        inputs = [packed, shares]
        x = ((np.unpackbits(packed, axis=2) * 2.0 - 1) * shares[:, :, None]).sum(axis=0)
        summands = np.broadcast_to(shares.sum(axis=0)[:, None], shape)
    # Mosaic GPU passes arguments in the order in which the kernel first uses them.
    options = [*([] if mask is None else [mask]), *([] if case.length is None else [np.int32([case.length])])]
    carry, bits = before.copy(), np.zeros((case.tensors, case.size // 8), np.uint8)
    squares = np.zeros((case.tensors, tile.blocks(case.size)), np.float32)
    ptx.run(text, [scale, carry, *inputs, *options, bits, squares], (squares.shape[1], case.tensors))

    error = before.astype(np.float64) - scale[:, None] * np.where(before >= 0, 1, -1)
    # Each of the additions is off by half a unit of what is no larger than the sum of all magnitudes.
    allowed = EPSILON * (case.workers + 2) * (summands + np.abs(before) + scale[:, None])
    off = np.abs(carry - np.where(kept, x + error, 0)) / allowed
    wrong = np.unpackbits(bits, axis=1).astype(bool) != (carry >= 0)
    exact = (carry.astype(np.float64) ** 2).sum(axis=1)
    return {
        "blocks": squares.size,
        "carry_off": float(off.max()),
        "wrong_bits": int(wrong.sum()),
        "squares_off": float(np.abs(squares.sum(axis=1, dtype=np.float64) / exact - 1).max()),
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Markdown: one row a kernel."""
    lines = [
        "| kernel | blocks | carry: error, of what rounding allows | wrong bits | squares: relative error | "
        "registers | spilled bytes | warps of 64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['case']} | {r['blocks']} | {r['carry_off']:.0%} | {r['wrong_bits']} | {r['squares_off']:.0e} | "
            f"{r['registers']} | {r['spilled_bytes']} | {r['warps']} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles sign_pack for an H200 and runs the PTX in numpy.")
    parser.add_argument("--dry", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    python = environment()
    [assembler] = ENVIRONMENT.glob("lib/python3*/site-packages/nvidia/cu13/bin/ptxas")
    texts = compiled(python)
    results = []
    for case in CASES:
        results.append(
            {"case": case.name, **emulated(case, texts[case.name]), **assembled(assembler, texts[case.name])}
        )
        print(results[-1], flush=True)
    broken = texts[CASES[0].name].replace(", 1, 31, -1", ", 2, 31, -1")
    results.append({"case": "control: the first one, lanes exchanged wrongly", **emulated(CASES[0], broken)})
    results[-1] |= assembled(assembler, broken)
    lines = table(results)
    print("\n".join(lines))
    if not options.dry:
        about = {"target": "sm_90a", "jax": version("jax"), "machine": machine()}
        (HERE / "results/h200.json").write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
        write_between_marks(HERE / "README.md", [*lines, "", f"jax {version('jax')}, PTX for sm_90a."])


if __name__ == "__main__":
    main()
