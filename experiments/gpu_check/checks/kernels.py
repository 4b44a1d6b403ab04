"""The ops of pallas_kernels: each against its reference, and their speed beside the memory's."""

import contextlib
from contextlib import AbstractContextManager

import jax
from item import Context, Outcome
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsjax.observe.devices import from_jax_device_kind
from pallas_kernels.checks import all_checks
from pallas_kernels.sign_pack import bench

LARGEST_INTERPRETED = 5_000  # values: interpreting takes a second for so many
BANDWIDTH_SHARE = 0.85


def compare(context: Context) -> Outcome:
    """Every op, kernel and shape: the largest error as a share of the allowed one."""
    errors, skipped, broken = {}, [], {}
    for check in all_checks():
        interpreted = context.rehearse and check.implementation == "mosaic"
        name = f"{check.name}, {check.implementation}{' interpreted' if interpreted else ''}"
        if interpreted and check.values > LARGEST_INTERPRETED:
            skipped.append(f"{name}: too large to interpret")
            continue
        with interpretation(interpreted):
            try:
                errors[name] = check.error()
            except (RuntimeError, ValueError) as error:  # what a compiler or a device says; the other cases go on
                broken[name] = str(error)[:2000]
        print(f"{name}: {errors.get(name, 'broken')}", flush=True)
        context.note(errors=errors, skipped=skipped, broken=broken)
    good = sum(error <= 1 for error in errors.values())
    total = len(errors) + len(broken)
    ours = f"{good} of {total} cases" + (f", {len(skipped)} skipped" if skipped else "")
    return Outcome(ours=ours, passed=good == total > 0)


def interpretation(wanted: bool) -> AbstractContextManager:
    """Let Mosaic's kernels be interpreted where there is no GPU."""
    return plgpu.force_gpu_interpret_mode() if wanted else contextlib.nullcontext()


def bandwidth(context: Context) -> Outcome:
    """Bytes that each phase cannot avoid over its time, beside a copy and the data sheet."""
    size = 2**11 if context.rehearse else 2**25
    device = from_jax_device_kind(jax.devices()[0].device_kind)
    peak = device.memory_bandwidth_gb_s if device else None
    rows: list[bench.Row] = []
    # XLA's figures first: they are kept if a kernel does not compile. Then both by turns. A CPU cannot run Mosaic's.
    for implementations in (["xla"],) if context.rehearse else (["xla"], ["xla", "mosaic"]):
        cases = bench.cases(8, size, num_workers=2, implementations=implementations)
        rows = bench.measure(cases, repeats=5, steps=5)
        print(bench.table(rows, peak=peak), flush=True)
        context.note(rows=[row._asdict() for row in rows], peak_gb_per_s=peak)
    if context.rehearse:
        return Outcome(ours="xla alone: no Mosaic on a CPU", passed=None)
    speeds = {row.op: row.gb_per_s for row in rows if row.implementation == "mosaic"}
    if peak is None:
        return Outcome(ours=", ".join(f"{speed:.0f} GB/s" for speed in speeds.values()), passed=None)
    shares = {op: speed / peak for op, speed in speeds.items()}
    context.note(shares=shares)
    ours = f"{shares['sign_pack']:.0%}, unpack_average {shares['unpack_average']:.0%}"
    return Outcome(ours=ours, passed=min(shares.values()) >= BANDWIDTH_SHARE)
