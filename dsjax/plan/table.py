"""A plan for the terminal: at most 100 columns."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsjax.mesh.config import AXES
from dsjax.observe.devices import SPECS
from dsjax.observe.memory import format_bytes
from dsjax.plan.plan import gpu_share
from dsjax.plan.result import Plan
from dsjax.plan.schedule import schedule_table

_WHAT = {
    "parameters": "float32, in their shards; of a run with lora those that are trained",
    "frozen": "parameters that are not trained, float32, in their shards",
    "gradients": "float32, in their shards",
    "optimizer": "moments, and error buffers where an optimizer keeps any",
    "ema": "moving average of the parameters",
    "batch": "tokens, targets, masks of all micro-batches",
    "residuals": "kept from the forward for the backward pass, from the traced gradient",
    "working": "everything else at the worst moment: one layer, gathered weights, logits",
}


def plan_table(plan: Plan, compiled: dict[str, Any] | None = None) -> RenderableType:
    """Memory, traffic, FLOPs and the verdict; with `compiled` what XLA:CPU made of it beside the prediction."""
    parts = [_memory(plan), Text()]
    if plan.traffic:
        parts += [_traffic(plan), Text()]
    if len(plan.rounds) > 1:
        parts += [_rounds(plan), Text()]
    if (shown := schedule_table(plan.schedule, plan.cost)) is not None:
        parts += [shown, Text()]
    parts.append(Text(f"{_flops(plan)}\n{_disk(plan)}"))
    if compiled is not None:
        parts += [Text(), _compiled(plan, compiled)]
    parts += [Text(f"warning: {line}", style="yellow") for line in plan.warnings]
    return Group(*parts, Text(), Text(verdict(plan), style="bold red" if plan.fits is False else "bold"))


def verdict(plan: Plan) -> str:
    """Whether it fits, and what dominates."""
    advice = plan.advice[0].upper() + plan.advice[1:]
    if plan.fits is None:
        names = fitting_devices(plan.peak)
        found = f"fits on {', '.join(names)}" if names else "fits on no known device"
        return f"{format_bytes(plan.peak)} a device {found} (--device NAME says how much is left). {advice}."
    assert plan.available is not None
    compared = f"{format_bytes(plan.needed)} of {format_bytes(plan.available)} ({plan.available_from})"
    return f"fits: {compared}" if plan.fits else f"does NOT fit: {compared}. {advice}."


def _memory(plan: Plan) -> Table:
    mesh = " x ".join(f"{axis} {plan.axis_sizes[axis]}" for axis in AXES if plan.axis_sizes[axis] > 1) or "one device"
    trained = f" ({plan.num_trained:,} trained)" if plan.num_trained < plan.num_parameters else ""
    title = f"{plan.name}: {plan.num_parameters:,} parameters{trained} on {mesh}, ZeRO {plan.zero_stage}"
    table = Table(title=title, width=100)
    table.add_column("on one device")
    table.add_column("bytes", justify="right")
    table.add_column("what it is", overflow="fold")
    for name, what in _WHAT.items():
        if size := getattr(plan.memory, name):
            table.add_row(name, format_bytes(size), what)
    table.add_section()
    table.add_row("peak", format_bytes(plan.peak), "during a step")
    return table


def _traffic(plan: Plan) -> Table:
    table = Table(title="Collectives of one step, bytes of the buffers on one device", width=100)
    table.add_column("axis")
    table.add_column("bytes", justify="right")
    table.add_column("what for")
    for row in plan.traffic:
        table.add_row(row.axis, format_bytes(row.bytes), row.what)
    return table


def _rounds(plan: Plan) -> Table:
    """Bytes that one device sends over `data` in the whole run, beside an average in every step."""
    workers = plan.axis_sizes["data"]
    steps = sum(row.steps for row in plan.rounds)
    total = sum(row.steps * row.sent for row in plan.rounds)
    always = steps * 2 * plan.gradient_bytes * (workers - 1) // workers
    table = Table(title=f"Sent by one device over data, {workers} workers", width=100)
    for heading in ("stage", "steps", "in a step", "in the run", "share"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in plan.rounds:
        share = f"{row.steps * row.sent / total:.1%}"
        table.add_row(row.stage, f"{row.steps:,}", format_bytes(row.sent), format_bytes(row.steps * row.sent), share)
    table.add_section()
    table.add_row("all", f"{steps:,}", format_bytes(total // steps), format_bytes(total), "")
    for bits, name in ((32, "float32 in every step"), (16, "16 bits in every step")):
        other = always * bits // 32
        table.add_row(name, f"{steps:,}", format_bytes(other // steps), format_bytes(other), f"{other / total:.2f}x")
    return table


def _flops(plan: Plan) -> str:
    ratio = plan.step_flops / plan.model_flops
    matrices = "6 N" if plan.num_trained == plan.num_parameters else "6 N trained + 4 N frozen"
    return (
        f"FLOPs of a step of {plan.step_tokens:,} tokens: {plan.model_flops:.3g} by {matrices} + 12 L D T, "
        f"{plan.step_flops:.3g} in the\ntraced matrix products ({ratio:.2f}x)"
    )


def _disk(plan: Plan) -> str:
    number = f"; up to {plan.checkpoints} at a time, the one being written among them" if plan.checkpoints > 1 else ""
    return f"A checkpoint has about {format_bytes(plan.checkpoint)}{number}"


def _compiled(plan: Plan, compiled: dict[str, Any]) -> Table:
    seconds = sum(program["seconds"] for program in compiled.values())
    table = Table(title=f"Compiled by XLA:CPU in {seconds:.1f} s; its sizes hold for a CPU", width=100)
    for heading in ("", "predicted", "compiled", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = []
    for name, predicted in (("gradient", plan.gradient), ("update", plan.update)):
        for kind in ("arguments", "temporary"):
            rows.append((f"{name}: {kind} bytes", getattr(predicted, kind), compiled[name][kind]))
    for axis in sorted({axis for program in compiled.values() for axis in program["axes"]}, key=AXES.index):
        moved = sum(row.bytes for row in plan.traffic if axis in row.axis.split("+"))
        if axis == "data" and len(plan.rounds) > 1:
            moved += plan.rounds[0].buffers
        rows.append((f"collectives over {axis}", moved, sum(p["axes"].get(axis, 0) for p in compiled.values())))
    for name, predicted, found in rows:
        ratio = f"{predicted / found:.2f}" if found else "-"
        table.add_row(name, format_bytes(predicted), format_bytes(found), ratio)
    return table


def fitting_devices(peak: int) -> list[str]:
    """Names of the known accelerators whose share for JAX holds `peak` bytes.

    Example:
        >>> "h200" in fitting_devices(10**9), fitting_devices(10**13)
        (True, [])
    """
    return [spec.name for spec in SPECS if spec.memory_bytes * gpu_share() >= peak]
