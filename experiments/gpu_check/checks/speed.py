"""GPT-3 1.3B in bfloat16 as experiments/pretraining_speed trains it, in the time that there is: one turn a side."""

import yaml
from gpu import HERE as PRETRAINING
from gpu import Bench, check, speed
from item import Context, Outcome

from dsjax.observe.devices import from_jax_device_kind

MFU = 0.55
ROWS = (8, 4)
"""Rows a step: the first number that fits, without recomputing anything. gpu.py looks for the best one."""
WARMUP, STEPS = 3, 12


def bench_for(context: Context) -> Bench:
    """The experiment's own, with fewer steps."""
    config = yaml.safe_load((PRETRAINING / "config.yaml").read_text())
    settings = config["tiny" if context.rehearse else "gpu"]
    if not context.rehearse:
        settings |= {"warmup_steps": WARMUP, "steps": STEPS}
    folder = context.work / "pretraining_speed"
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(settings, folder, optimizer=config["optimizer"], tiny=context.rehearse)


def training(context: Context) -> Outcome:
    """Tokens per second of dsjax alone, and their share of what the device could do."""
    bench = bench_for(context)
    result = {"out_of_memory": True}
    for rows in ROWS:
        if result["out_of_memory"]:
            result = speed(bench, "jax", rows=rows, remat="none", name=f"gpu-check-{rows}")
            context.note(**result)
    if result["out_of_memory"]:
        return Outcome(ours=f"{rows} rows: out of memory", passed=False)
    device = from_jax_device_kind(result["about"]["device"])
    if device is None or device.peak_bf16_tflops is None:
        return Outcome(ours=f"{result['tokens_per_second']:,.0f} tokens/s", passed=None)
    share = result["mfu"] * bench.settings["peak_flops"] / (1e12 * device.peak_bf16_tflops)
    context.note(mfu=share)
    return Outcome(ours=f"{share:.1%}, {result['tokens_per_second']:,.0f} tokens/s", passed=share >= MFU)


def beside_torch(context: Context) -> Outcome:
    """torch.compile with as many rows, and whether both sides do the same work."""
    bench, ours = bench_for(context), context.earlier.get("speed:training", {})
    result = speed(bench, "torch", rows=ours.get("rows", ROWS[0]), remat="none", name="gpu-check")
    context.note(torch=result)
    if result["out_of_memory"]:
        return Outcome(ours=f"torch, {result['rows']} rows: out of memory", passed=None)
    context.note(check=check(bench))  # ValueError if the losses differ
    theirs = result["tokens_per_second"]
    if "tokens_per_second" not in ours:
        return Outcome(ours=f"torch {theirs:,.0f} tokens/s, ours unknown", passed=None)
    ratio = ours["tokens_per_second"] / theirs
    context.note(ratio=ratio)
    return Outcome(ours=f"{ratio:.2f}x of {theirs:,.0f}", passed=None if context.rehearse else ratio >= 1)
