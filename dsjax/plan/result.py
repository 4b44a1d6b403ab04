"""The plan of a run as values: bytes per device, traffic, FLOPs, and whether it fits."""

import dataclasses
from typing import Any

from dsjax.plan.cost import Cost
from dsjax.plan.rounds import Round
from dsjax.plan.schedule import schedule_rows
from dsjax.plan.traffic import Traffic
from dsjax.setup.schedule import StepSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    frozen: int
    gradients: int
    optimizer: int
    ema: int
    batch: int
    residuals: int
    working: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramBytes:
    """Bytes of one program on one device, as `memory_analysis()` of the compiled one divides them."""

    arguments: int
    temporary: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    Attributes:
        name: of the run.
        axis_sizes: the mesh.
        zero_stage: what is split over fsdp.
        num_parameters: of the model, adapters included.
        num_trained: of those, what is trained: all of them, but of a run with lora.
        memory: bytes per device by what they are; their sum is `peak`.
        gradient, update: bytes of the two programs.
        peak: most bytes on one device during a step.
        traffic: bytes per step and axis; over `data` only what is the same in every step.
        gradient_bytes: of the gradients that are averaged over `data`, on one device.
        schedule: lengths and kept tokens of every step.
        cost: FLOPs of every step.
        rounds: what crosses `data` in each stage of the optimizer; empty with one worker.
        step_flops: of all devices in a step's matrix products, what is computed again included.
        model_flops: the same by the formula 6 N + 12 L D T, nothing again.
        step_tokens: positions in a step.
        needed: bytes to hold against `available`: the peak of one device, or of all that share a host's memory.
        available: bytes that there are, None if no device was named.
        available_from: where `available` is from.
        advice: what dominates and what to change, one line.
        checkpoint: bytes of a checkpoint.
        checkpoints: most of them that lie on the disk at a time.
        warnings: what may not be meant, and what this machine lacks for the run's end, a line each.
    """

    name: str
    axis_sizes: dict[str, int]
    zero_stage: int
    num_parameters: int
    num_trained: int
    memory: Memory
    gradient: ProgramBytes
    update: ProgramBytes
    peak: int
    traffic: tuple[Traffic, ...]
    gradient_bytes: int
    schedule: StepSchedule
    cost: Cost
    rounds: tuple[Round, ...]
    step_flops: int
    model_flops: float
    step_tokens: int
    needed: int
    available: int | None
    available_from: str
    advice: str
    checkpoint: int
    checkpoints: int
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether there is memory enough; None if it is not known how much there is."""
        return None if self.available is None else self.needed <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("schedule", "cost")}
        rounds, traffic = ([dataclasses.asdict(row) for row in rows] for rows in (self.rounds, self.traffic))
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in ("memory", "gradient", "update")}
        rows = schedule_rows(self.schedule, self.cost)
        return {**plain, **parts, "rounds": rounds, "traffic": traffic, "schedule": rows, "fits": self.fits}
