"""Collective communication of a compiled program, counted from its text (`compiled.as_text()`), not from a formula.

What is counted, by construction of the text:

- an instruction inside a `while` counts as often as the loop runs, loops inside loops multiply; the trip count is the
  one XLA recorded, else it is worked out from the loop's counter, else (and only if the loop communicates) it raises;
- of the branches of a `conditional` the one with the most bytes counts, so the figure is an upper bound there;
- an asynchronous pair (`all-gather-start`, `all-gather-done`) counts once;
- groups of one device do not communicate and are left out.

`Collective.bytes` is the larger of operand and result on one device, that is the size of the whole buffer that the
group works on: the result of an all-gather, the operand of a reduce-scatter, either side of an all-reduce, all-to-all
or permute; for a ragged-all-to-all it is the output buffer, an upper bound. Buffers combined into one instruction
(tuples) are summed. Of this a ring of g devices sends (g-1)/g over each wire, and twice that for an all-reduce.

XLA:CPU is not XLA:GPU: it widens bf16 and 4-bit payloads, and which collectives it combines or turns into
reduce-scatter may differ, so compare counts with counts of the same backend.
"""

import dataclasses
import functools
from collections.abc import Iterable

from dsjax.collectives.hlo_groups import axes_of_groups, axes_of_pairs, groups_text, parse_pairs
from dsjax.collectives.hlo_loops import trip_count
from dsjax.collectives.hlo_text import Computation, Instruction, Module, parse_module, shape_bytes, tuple_elements

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# The groups of these are of partitions only when the instruction says so.
_SAYS_GLOBAL = ("all-reduce", "all-gather", "reduce-scatter")


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """One collective instruction of a program."""

    kind: str
    """One of KINDS, whether XLA runs it synchronously or not."""
    axes: tuple[str, ...]
    """Mesh axes that its groups span, in mesh order."""
    bytes: int
    """Bytes of one execution on one device: the larger of operand and result."""
    count: int
    """Executions in one call of the program."""
    dtype: str
    """XLA's element type, such as 'f32' or 'u8'; 'f32+u8' if it combines several."""
    name: str
    """The instruction's name in the text."""
    op_name: str
    """Where it came from in the JAX program; '' if XLA does not say."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all executions in one call on one device."""
        return self.bytes * self.count


def count_collectives(hlo_text: str, axis_sizes: dict[str, int]) -> list[Collective]:
    """Collectives of one call of a compiled program, in the order in which it first reaches them.

    Args:
        hlo_text: `jax.jit(f).lower(...).compile().as_text()`.
        axis_sizes: mesh axes and sizes in the mesh's order, `dict(mesh.shape)`.

    Raises:
        ValueError: text that is not a compiled program, a mesh of another number of devices, or a collective whose
            shape, groups or number of executions cannot be read; it names the instruction.

    Example:
        >>> text = '''HloModule m, is_scheduled=true, num_partitions=4
        ... ENTRY %main (p: f32[8]) -> f32[16] {
        ...   %p = f32[8]{0} parameter(0)
        ...   ROOT %g = f32[16]{0} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}, \
use_global_device_ids=true
        ... }'''
        >>> [(c.kind, c.axes, c.bytes, c.count) for c in count_collectives(text, {"data": 2, "tensor": 2})]
        [('all-gather', ('tensor',), 64, 1)]
    """
    module = parse_module(hlo_text)
    devices = functools.reduce(int.__mul__, axis_sizes.values(), 1)
    if module.num_devices != devices:
        sizes = ", ".join(f"{name}={size}" for name, size in axis_sizes.items())
        raise ValueError(f"the program is for {module.num_devices} devices but the mesh {sizes} has {devices}")
    return list(_Counter(module, tuple(axis_sizes.items())).computation(module.entry).values())


def total_bytes(collectives: Iterable[Collective], *, axis: str | None = None, kind: str | None = None) -> int:
    """Bytes per device of one call of the program.

    Args:
        collectives: from count_collectives.
        axis: only those that span this axis, alone or with others.
        kind: only this kind, one of KINDS.

    Raises:
        ValueError: a kind that does not exist.

    Example:
        >>> reduce = Collective("all-reduce", ("data",), 64, 3, "f32", "ar", "")
        >>> total_bytes([reduce]), total_bytes([reduce], axis="tensor"), total_bytes([reduce], kind="all-reduce")
        (192, 0, 192)
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind of collective {kind!r}; choose one of {', '.join(KINDS)}")
    return sum(
        c.total_bytes for c in collectives if (axis is None or axis in c.axes) and (kind is None or kind == c.kind)
    )


def table(collectives: Iterable[Collective]) -> list[tuple[str, str, str, int, int, int]]:
    """Rows (kind, axes, dtype, executions, bytes of each, bytes in all), equal ones merged, most bytes first.

    Example:
        >>> reduce = Collective("all-reduce", ("data", "fsdp"), 64, 3, "f32", "ar", "")
        >>> table([reduce, reduce])
        [('all-reduce', 'data+fsdp', 'f32', 6, 64, 384)]
    """
    counts: dict[tuple[str, str, str, int], int] = {}
    for c in collectives:
        key = (c.kind, "+".join(c.axes), c.dtype, c.bytes)
        counts[key] = counts.get(key, 0) + c.count
    rows = [(kind, axes, dtype, n, size, n * size) for (kind, axes, dtype, size), n in counts.items()]
    return sorted(rows, key=lambda row: (-row[-1], row))


def _add(total: dict[str, Collective], found: dict[str, Collective], *, times: int = 1) -> None:
    for key, one in found.items():
        count = one.count * times + (total[key].count if key in total else 0)
        if count:
            total[key] = dataclasses.replace(one, count=count)


class _Counter:
    """Walks the calls of a module; what one call of a computation does is worked out once."""

    def __init__(self, module: Module, axis_sizes: tuple[tuple[str, int], ...]):
        self.module = module
        self.axis_sizes = axis_sizes
        self.done: dict[str, dict[str, Collective]] = {}

    def computation(self, name: str) -> dict[str, Collective]:
        """Collectives of one execution of a computation, keyed by where they stand in the text."""
        if name not in self.done:
            if name not in self.module.computations:
                raise ValueError(f"the text calls computation {name} but does not hold it")
            here = self.module.computations[name]
            total: dict[str, Collective] = {}
            for instruction in here.instructions.values():
                _add(total, self.instruction(here, instruction))
            self.done[name] = total
        return self.done[name]

    def instruction(self, computation: Computation, instruction: Instruction) -> dict[str, Collective]:
        """Collectives of one execution of an instruction and of all that it calls."""
        # `-start` begins an operation and holds its attributes; `-update` and `-done` only wait for it.
        base, start, _ = instruction.opcode.partition("-start")
        if base in KINDS:
            found = self.collective(instruction, base, is_start=bool(start))
            return {f"{computation.name}/{instruction.name}": found} if found else {}
        if instruction.opcode.endswith(("-done", "-update")):
            return {}
        if base.startswith(("all-", "collective-", "reduce-scatter", "ragged-all-")):
            raise ValueError(f"unknown collective {instruction.opcode} in {instruction.name}")
        if base in ("send", "recv") and "is_host_transfer=true" not in instruction.attributes:
            raise ValueError(f"{instruction.name}: a {base} between devices cannot be attributed to mesh axes")
        if "=%" not in instruction.rest and "={" not in instruction.rest:
            return {}
        called = instruction.called
        match base:
            case "while":
                return self.loop(computation, instruction)
            case "conditional":
                branches = [self.computation(name) for names in called.values() for name in names]
                return max(branches, key=lambda found: total_bytes(found.values()), default={})
            case "call" | "fusion" | "async":
                names = [name for attribute in ("calls", "to_apply") for name in called.get(attribute, [])]
                # XLA repeats to_apply on an asynchronous call; a computation is entered once.
                return self.computation(names[0]) if names else {}
        if any(self.computation(name) for names in called.values() for name in names):
            raise ValueError(
                f"{instruction.name}: how often a {instruction.opcode} runs the collectives inside it is not known"
            )
        return {}

    def loop(self, computation: Computation, loop: Instruction) -> dict[str, Collective]:
        body, condition = (self.computation(loop.called[part][0]) for part in ("body", "condition"))
        if not body and not condition:
            return {}
        trips = trip_count(self.module, computation, loop)
        if trips is None:
            inside = ", ".join(sorted({found.name for found in [*body.values(), *condition.values()]}))
            raise ValueError(
                f"{loop.name} ({loop.op_name or 'no source'}): how often this loop runs cannot be read, and it holds "
                f"{inside}; give it a fixed number of steps (lax.scan, or fori_loop with constant bounds)"
            )
        total: dict[str, Collective] = {}
        _add(total, body, times=trips)
        # The condition is asked once more than it says yes.
        _add(total, condition, times=trips + 1)
        return total

    def collective(self, instruction: Instruction, kind: str, *, is_start: bool) -> Collective | None:
        attributes = instruction.attributes
        try:
            _check_partitions(attributes, kind)
            if kind == "collective-permute":
                axes, group_size = axes_of_pairs(parse_pairs(attributes), self.axis_sizes), 1
            else:
                axes, group_size = axes_of_groups(groups_text(attributes), self.axis_sizes)
            size, dtypes = shape_bytes(_result_shape(instruction.shape, kind) if is_start else instruction.shape)
        except ValueError as error:
            raise ValueError(f"cannot count {instruction.name} ({kind}): {error}") from error
        if not axes:
            return None
        size *= group_size if kind == "reduce-scatter" else 1
        return Collective(kind, axes, size, 1, "+".join(dtypes), instruction.name, instruction.op_name)


def _check_partitions(attributes: str, kind: str) -> None:
    """Refuses groups of replicas (pmap): a program made by jax.jit has one replica of many partitions."""
    if "channel_id=" not in attributes or (kind in _SAYS_GLOBAL and "use_global_device_ids=true" not in attributes):
        raise ValueError("its groups are of replicas, not of partitions (no channel_id or use_global_device_ids)")


def _result_shape(shape: str, kind: str) -> str:
    """The result inside the shape of a `-start`, which also holds the operands and the backend's own state.

    `((operands), result, ...)` in general, `(operand, result, ...)` for gather and permute; an all-reduce-start of the
    older form has just the shape of its result.
    """
    elements = tuple_elements(shape)
    if elements is None or (kind == "all-reduce" and not elements[0].startswith("(")):
        return shape
    if len(elements) < 2:
        raise ValueError(f"the shape of its start has no result: {shape}")
    return elements[1]
