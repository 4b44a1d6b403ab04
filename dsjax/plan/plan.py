"""Plan of a run before it runs: bytes per device, traffic, FLOPs, whether it fits. Nothing is allocated.

Shapes and PartitionSpecs give the bytes of everything that has a name; the step itself, traced for one device, gives
what the forward pass keeps for the backward pass (residuals) and what else is held at the worst moment (working). A
step is two programs, the gradient and the update; the peak is the larger of the two with the state beside it.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsjax.config.run import ResolvedRunConfig, RunConfig
from dsjax.data.rows.formats import row_format
from dsjax.mesh.build import resolve_sizes
from dsjax.mesh.config import AXES
from dsjax.mesh.layout import BATCH_AXES, Layout
from dsjax.models.families.build import check_divisible, check_length
from dsjax.models.tree import count_parameters
from dsjax.observe.devices import DeviceSpec
from dsjax.observe.memory import available_memory_bytes, device_memory_report, format_bytes
from dsjax.plan.cost import Cost
from dsjax.plan.preflight import advise, check_end, missing_tools, refuse_all
from dsjax.plan.result import Memory, Plan, ProgramBytes
from dsjax.plan.rounds import predict_rounds
from dsjax.plan.trace import OneDevice, Shapes, Traced, abstract_layout, batch_shapes, shard_bytes, trace
from dsjax.plan.traffic import predict_traffic
from dsjax.runs.disk import checkpoints_at_once, disk_problem, tensor_bytes
from dsjax.setup.assembly import Setup, assemble
from dsjax.setup.placement import evaluation_placement, training_placement
from dsjax.setup.resolve import resolved
from dsjax.setup.step import BATCH_SPEC

_SCALARS = 12  # step and key


def plan(config: RunConfig, *, num_devices: int | None = None, device: DeviceSpec | None = None) -> Plan:
    """Plan a run on a mesh that need not exist.

    Args:
        config: the run.
        num_devices: devices of the mesh; None takes the product of its sizes, or cpu_devices if one of them is -1.
        device: the accelerator; None compares with this host's memory if the run is on CPU.

    Raises:
        ValueError: the mesh, the model and the batch do not fit each other (all that is wrong, at once), or the number
            of devices is not known.

    Example:
        >>> from dsjax.models.families.bloom.config import BloomConfig
        >>> from dsjax.setup.config import TrainConfig
        >>> small = BloomConfig(vocab_size=64, num_layers=2, model_dim=16, num_heads=2)
        >>> needs = plan(RunConfig(model=small, train=TrainConfig(steps=1)), num_devices=1)
        >>> needs.memory.parameters == 4 * needs.num_parameters, needs.memory.optimizer == 8 * needs.num_parameters + 4
        (True, True)
    """
    setup = planned_setup(config, num_devices=num_devices)
    config, layout = setup.config, setup.layout
    on_cpu = device is None and config.mesh.platform != "gpu" and bool(config.mesh.cpu_devices or layout.mesh.size == 1)
    available = Available()
    if device is not None:
        share = gpu_share()
        available = Available(int(device.memory_bytes * share), f"{share:.0%} of a {device.name}")
    elif on_cpu:
        available = Available(available_memory_bytes(), "available on this host", sharing=layout.mesh.size)
    found = _plan(setup, available)
    here = [f"on this machine {problem}" for problem in missing_tools(config.observe)]
    if on_cpu:  # else the run is for another machine, and so is its disk
        problem, _ = disk_problem(Path("runs"), found.checkpoint, found.checkpoints)
        here += [problem] if problem else []
    return dataclasses.replace(found, warnings=(*found.warnings, *here))


def planned_setup(config: RunConfig, *, num_devices: int | None = None) -> Setup:
    """Assemble a run on a mesh that need not exist; arguments and errors as of `plan`.

    Example:
        >>> from dsjax.mesh.config import MeshConfig
        >>> from dsjax.setup.config import TrainConfig
        >>> run = RunConfig(mesh=MeshConfig(data=2, fsdp=4, zero_stage=3), train=TrainConfig(steps=1))
        >>> planned_setup(run).shapes.params["embed"]["table"].sharding.spec
        P('tensor', ('fsdp', 'expert'))
    """
    config = resolved(config)
    layout = abstract_layout(_sizes(config, num_devices), config.mesh.zero_stage)
    _check(config, layout)
    return assemble(config, layout=layout)


def gpu_share() -> float:
    """The part of a GPU's memory that JAX takes when it starts, and never more."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


def require_memory(setup: Setup) -> None:
    """Refuse a run that this machine's memory will not hold; called before anything large is allocated.

    Args:
        setup: the run, on the devices that there are.

    Raises:
        ValueError: bytes needed and available, the largest parts, and how to run all the same.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        available = Available(available_memory_bytes(), "available on this host", sharing=len(devices))
    else:
        free = [d.limit - (d.in_use or 0) for d in device_memory_report(devices) if d.limit is not None]
        available = Available(min(free) if free else None, f"free on a {devices[0].device_kind}")
    needs = _plan(setup, available)
    if needs.fits is False:
        assert needs.available is not None
        shared = f" for {len(devices)} devices that share it" if devices[0].platform == "cpu" else " on each device"
        raise ValueError(
            f"this run needs {format_bytes(needs.needed)}{shared}, but {format_bytes(needs.available)} are "
            f"{needs.available_from}; {needs.advice}; or run all the same with --force"
        )


def _sizes(config: RunConfig, num_devices: int | None) -> dict[str, int]:
    """Sizes of the axes."""
    given = [getattr(config.mesh, axis) for axis in AXES]
    if num_devices is None:
        if -1 in given and not config.mesh.cpu_devices:
            raise ValueError("an axis of the mesh is -1 (the rest): give the number of devices, --devices N")
        num_devices = config.mesh.cpu_devices if -1 in given else math.prod(given)
    return resolve_sizes(config.mesh, num_devices)


def _check(config: ResolvedRunConfig, layout: Layout) -> None:
    """Raise one ValueError with everything that does not divide."""
    train = config.train
    parts = layout.size(("data", *BATCH_AXES))
    evaluated = config.evaluate.batch_size or train.batch_size // train.accumulation
    checks: list[Callable[[], Any]] = [
        lambda: check_divisible(config.model, layout.mesh.shape),
        lambda: check_length(config.model, config.data.sequence_length),
        lambda: check_end(config),
    ]
    # Of placements only the complaint is wanted: a mesh without devices cannot place anything.
    if train.batch_size % (parts * train.accumulation):
        checks.append(lambda: training_placement(layout, batch_size=train.batch_size, accumulation=train.accumulation))
    elif evaluated % parts:
        checks.append(lambda: evaluation_placement(layout, batch_size=evaluated))
    refuse_all(checks)


@dataclasses.dataclass(frozen=True)
class Available:
    """Memory to hold against what a run needs.

    Attributes:
        bytes: how much there is; None if nobody knows.
        source: where it is.
        sharing: how many devices of the mesh take of it.
    """

    bytes: int | None = None
    source: str = ""
    sharing: int = 1


def _plan(setup: Setup, available: Available) -> Plan:
    """The plan of a run whose mesh divides everything."""
    config, layout, train = setup.config, setup.layout, setup.config.train
    sizes, state, frozen = dict(layout.mesh.shape), setup.shapes, setup.frozen
    row = row_format(config.data)
    batch = batch_shapes(row, train.batch_size, workers=sizes["data"], accumulation=train.accumulation)
    one = OneDevice.of(setup, batch)
    traced = trace(setup, one)
    memory, gradient, update = _memory(setup, batch, traced)
    peak = sum(dataclasses.asdict(memory).values())
    cost = Cost.of(setup)
    trained = count_parameters(setup.model)
    return Plan(
        name=config.name,
        axis_sizes=sizes,
        zero_stage=layout.zero_stage,
        num_parameters=trained + (0 if frozen is None else count_parameters(frozen)),
        num_trained=trained,
        memory=memory,
        gradient=gradient,
        update=update,
        peak=peak,
        gradient_bytes=memory.gradients,
        schedule=setup.schedule,
        cost=cost,
        rounds=predict_rounds(setup),
        traffic=predict_traffic(setup, rows=one.batch["tokens"].shape[2]),
        step_flops=traced.flops * layout.mesh.size,
        model_flops=cost.dense,
        step_tokens=train.batch_size * config.data.sequence_length,
        needed=peak * available.sharing,
        available=available.bytes,
        available_from=available.source,
        advice=_advice(config, layout, memory, traced, peak),
        checkpoint=tensor_bytes(state),
        checkpoints=checkpoints_at_once(config.checkpoint, setup.schedule.num_steps),
        warnings=tuple(advise(config, setup.schedule, workers=sizes["data"])),
    )


def _memory(setup: Setup, batch: Shapes, traced: Traced) -> tuple[Memory, ProgramBytes, ProgramBytes]:
    """Bytes on one device: by what they are, of the gradient program and of the update."""
    model, frozen, layout, state, specs = setup.model, setup.frozen, setup.layout, setup.shapes, setup.specs
    size = lambda tree, spec: shard_bytes(tree, spec, dict(layout.mesh.shape))
    parameters = size(state.params, specs.params)
    untrained = 0 if frozen is None else size(frozen.shapes, frozen.specs(layout.parameter))
    gradients = size(model.shapes, model.specs(layout.gradient))
    opt_state = size(state.opt_state, specs.opt_state)
    ema = size(state.ema, specs.ema) if state.ema is not None else 0
    batch_bytes = size(batch, dict.fromkeys(batch, BATCH_SPEC))

    whole = parameters + opt_state + ema + _SCALARS
    gradient = ProgramBytes(
        arguments=parameters + untrained + _SCALARS + batch_bytes, temporary=traced.gradient_temporary
    )
    update = ProgramBytes(arguments=whole + gradients + 8, temporary=traced.update_temporary)
    temporary = max(gradient.temporary, update.temporary)
    # Outside a scan XLA computes some of them again where they are read, and then holds less than all of them.
    residuals = min(traced.residuals, temporary)
    memory = Memory(
        parameters=parameters,
        frozen=untrained,
        gradients=gradients,
        optimizer=opt_state,
        ema=ema,
        batch=batch_bytes,
        residuals=residuals,
        working=temporary - residuals,
    )
    return memory, gradient, update


def _advice(config: ResolvedRunConfig, layout: Layout, memory: Memory, traced: Traced, peak: int) -> str:
    """The two largest parts, and what makes the largest smaller."""
    parts = sorted(dataclasses.asdict(memory).items(), key=lambda part: -part[1])[:2]
    largest = " and ".join(f"{name} {format_bytes(size)}" for name, size in parts)
    shards = layout.size(("fsdp", "expert"))
    states = memory.parameters + memory.frozen + memory.gradients + memory.optimizer + memory.ema
    if states > peak / 2:
        if shards > 1 and layout.zero_stage < 3:
            change = f"mesh.zero_stage=3 splits all states over {shards} devices"
        else:
            change = "a larger mesh.fsdp with mesh.zero_stage=3, or a larger mesh.tensor, splits the states further"
    elif traced.residuals > peak / 4 and config.model.remat != "full":
        change = "model.remat=full keeps only each layer's input"
    elif config.train.batch_size // config.train.accumulation > layout.size(("data", *BATCH_AXES)):
        change = f"a larger train.accumulation (now {config.train.accumulation}) makes the micro-batch smaller"
    else:
        change = "a larger mesh.tensor splits every activation, a shorter data.sequence_length makes it smaller"
    return f"largest are {largest}; {change}"
