"""Benchmark of the three phases, beside a copy in the same process and the memory's own speed.

    python -m pallas_kernels.sign_pack.bench                                    # CPU: 16.7 million values, XLA
    python -m pallas_kernels.sign_pack.bench --values 268435456 --implementations xla mosaic --peak 4800    # H200

A phase is counted with the bytes that it cannot avoid: x in, the carry in and out, the bits. What an implementation
moves beyond that shows as a lower speed. Everything is donated; runs of the implementations alternate.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.sign_pack import api

type State = tuple[jax.Array, ...]


class Case(NamedTuple):
    """One row of the table: `step` maps what it made last, which is donated, to the next."""

    op: str
    implementation: str
    bytes: float
    step: Callable[[State], State]
    start: State


class Row(NamedTuple):
    """One measurement: the median of a step in ms, and unavoidable bytes over time."""

    op: str
    implementation: str
    ms: float
    gb_per_s: float


def cases(num_tensors: int, size: int, *, num_workers: int, implementations: list[str]) -> list[Case]:
    """The copy, and each phase in each implementation, for `num_tensors` tensors of `size` float32 values.

    Example:
        >>> [f"{case.op}: {case.bytes:.0f}" for case in cases(1, 1024, num_workers=2, implementations=["xla"])]
        ['copy: 8192', 'sign_pack: 12416', 'unpack_average: 4288', 'unpack: 4224']
    """
    if size % (8 * num_workers):
        raise ValueError(f"{size} values to a tensor are no multiple of 8 x {num_workers} workers: choose another size")
    values, chunk = num_tensors * size, size // num_workers
    x = jax.random.normal(jax.random.key(0), (num_tensors, size))
    scale = jnp.ones(num_tensors)
    bits = jax.random.bits(jax.random.key(1), (num_workers, num_tensors, chunk // 8), jnp.uint8)
    scales = jnp.ones((num_workers, num_tensors))

    def start(size: int) -> State:
        return (jnp.zeros((num_tensors, size)),)

    def case(op: str, implementation: str, count: float, function: Callable, *inputs: jax.Array, size: int) -> Case:
        # keep_unused: also what is only written over (a fresh buffer of this size costs more than the work).
        jitted = jax.jit(function, donate_argnums=0, keep_unused=True)
        return Case(op, implementation, count, lambda state: jitted(state[0], *inputs), start(size))

    found = [case("copy", "xla", 8 * values, lambda out, x: (x * 2,), x, size=size)]
    for name in implementations:
        pack = functools.partial(api.sign_pack, implementation=name)
        average = functools.partial(api.unpack_average, implementation=name)
        found += [
            case("sign_pack", name, 12.125 * values, lambda c, x, s, f=pack: f(x, c, s), x, scale, size=size),
            case(
                "unpack_average",
                name,
                values / num_workers * (8.125 + num_workers / 8),
                lambda c, b, t, s, f=average: f(b, t, c, s),
                bits,
                scales,
                scale,
                size=chunk,
            ),
        ]
    unpack = lambda out, b, t: (api.unpack(b, t, implementation="xla"),)
    return [*found, case("unpack", "xla", 4.125 * values, unpack, bits, scales, size=size)]


def measure(all_cases: list[Case], *, repeats: int, steps: int) -> list[Row]:
    """The median over `repeats` of the time of one of `steps` steps that follow each other without waiting."""
    states = [jax.block_until_ready(case.step(case.start)) for case in all_cases]  # compiled, and its pages touched
    times = [[] for _ in all_cases]
    for _ in range(repeats):
        for index, case in enumerate(all_cases):
            state, began = states[index], time.perf_counter()
            for _ in range(steps):
                state = case.step(state)
            states[index] = jax.block_until_ready(state)
            times[index].append((time.perf_counter() - began) / steps)
    medians = [statistics.median(each) for each in times]
    return [
        Row(case.op, case.implementation, 1e3 * median, case.bytes / median / 1e9)
        for case, median in zip(all_cases, medians, strict=True)
    ]


def table(rows: list[Row], *, peak: float | None) -> str:
    """The rows as Markdown, with the speed as a share of the copy's and of the memory's peak (GB/s).

    Example:
        >>> print(table([Row("copy", "xla", 2.0, 4000.0), Row("sign_pack", "mosaic", 1.5, 4200.0)], peak=4800))
        | op             | implementation |       ms |   GB/s | of the copy | of the peak |
        |----------------|----------------|----------|--------|-------------|-------------|
        | copy           | xla            |    2.000 | 4000.0 |        100% |         83% |
        | sign_pack      | mosaic         |    1.500 | 4200.0 |        105% |         88% |
    """
    head = ["| op             | implementation |       ms |   GB/s | of the copy | of the peak |"]
    rule = ["|----------------|----------------|----------|--------|-------------|-------------|"]
    copy = rows[0].gb_per_s
    share = lambda row, of: f"{row.gb_per_s / of:.0%}" if of else "-"
    return "\n".join(
        head
        + rule
        + [
            f"| {row.op:14} | {row.implementation:14} | {row.ms:8.3f} | {row.gb_per_s:6.1f} "
            f"| {share(row, copy):>11} | {share(row, peak):>11} |"
            for row in rows
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Times the phases of the one-bit all-reduce.")
    parser.add_argument("--values", type=int, default=2**24, help="values of all tensors together (16.7 million)")
    parser.add_argument("--tensors", type=int, default=8, help="among how many tensors (8)")
    parser.add_argument("--workers", type=int, default=2, help="workers, and so chunks of a tensor (2)")
    parser.add_argument("--implementations", nargs="+", default=["xla"], choices=["xla", "mosaic"])
    parser.add_argument("--repeats", type=int, default=9, help="rounds over all rows; medians are shown (9)")
    parser.add_argument("--steps", type=int, default=5, help="calls in a row that are timed together (5)")
    parser.add_argument("--peak", type=float, help="the memory's speed by its data sheet, GB/s (H200: 4800)")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args(arguments)
    size = options.values // options.tensors
    found = cases(options.tensors, size, num_workers=options.workers, implementations=options.implementations)
    rows = measure(found, repeats=options.repeats, steps=options.steps)
    device = jax.devices()[0]
    about = {"device": device.device_kind, "jax": jax.__version__, "tensors": options.tensors, "size": size}
    about |= {"workers": options.workers, "repeats": options.repeats, "steps": options.steps}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows, peak=options.peak))
    if options.json:
        options.json.write_text(json.dumps(about | {"rows": [row._asdict() for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
