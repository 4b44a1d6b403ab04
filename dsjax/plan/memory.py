"""The most that a traced program holds at once, beside its arguments and results; see jaxpr.py for the rules."""

from jax.extend.core import Jaxpr

from dsjax.plan.jaxpr import (
    Op,
    Program,
    flatten,
    is_broadcast,
    is_elementwise,
    is_fusible,
    is_loop,
    is_view,
    scan_parts,
    transposed,
)


def _roots(program: Program) -> dict[int, int]:
    """value -> the value whose buffer it is."""
    root: dict[int, int] = {}
    for op in program.ops:
        if is_view(op, program):
            source = op.inputs[0]
            assert source is not None
            root[op.outputs[0]] = root.get(source, source)
    return root


def _fused(program: Program, root: dict[int, int]) -> set[int]:
    """Values that are never written: computed where their one consumer needs them."""
    users: dict[int, list[Op]] = {}
    for op in program.ops:
        if op.outputs[0] not in root:
            for number in {n for n in op.inputs if n is not None}:
                users.setdefault(root.get(number, number), []).append(op)
    kept = {root.get(n, n) for n in program.outputs if n is not None}
    fused = set()
    for op in program.ops:
        out = op.outputs[0]
        if out in root or out in kept or not is_fusible(op.eqn):
            continue
        consumers = users.get(out, [])
        # What is to be split is computed in its shards.
        taken = all(is_loop(user.eqn) or user.name == "sharding_constraint" for user in consumers)
        if taken and (len(consumers) <= 1 or is_broadcast(op.eqn)):
            fused.add(out)
    return fused


def _reads(program: Program, root: dict[int, int], fused: set[int]) -> list[set[int]]:
    """For every operation the buffers that it reads, through what is fused into it."""
    through: dict[int, set[int]] = {}
    source: dict[int, set[int]] = {}
    reads = []
    for op in program.ops:
        found: set[int] = set()
        for number in op.inputs:
            if number is not None:
                buffer = root.get(number, number)
                found |= through.get(buffer, {buffer})
        if op.name == "dot_general":
            for number in transposed(op):
                found |= source.get(root.get(number, number), set())
        if is_elementwise(op.eqn):
            source[op.outputs[0]] = found
        if op.outputs[0] in fused:
            through[op.outputs[0]] = found
            found = set()
        reads.append(found)
    return reads


def peak_bytes(program: Program, *, donated: bool = False) -> int:
    """Bytes held at most beside arguments and results, which are the caller's.

    Args:
        program: from `flatten`.
        donated: results overwrite arguments, so no intermediate value can be where a result will be.

    Example:
        >>> import jax
        >>> f = lambda x: ((x @ x) @ x).sum()
        >>> jaxpr = jax.make_jaxpr(f)(jax.ShapeDtypeStruct((4, 4), "float32")).jaxpr
        >>> peak_bytes(flatten(jaxpr))
        128
    """
    buffers = _Buffers(program)
    return _sweep(buffers, outside=buffers.callers(in_place=not donated), copied=set(), end=len(program.ops))


def _scan_peak(op: Op, program: Program) -> int:
    """Bytes that one iteration holds beside the loop's arguments, carry and stacked results.

    A slice of a stacked argument is copied out before its first use; what goes into a stacked result is copied there
    when it is done.
    """
    body, whole, carried = scan_parts(op.eqn)
    inner = flatten(body.jaxpr, [1 if n is None else program.divisors[n] for n in op.inputs])
    buffers = _Buffers(inner)
    for number in inner.outputs[carried:]:
        if number is not None:
            buffers.release(number)
    return _sweep(buffers, outside=set(inner.inputs[:whole]), copied=set(inner.inputs[whole:]), end=len(inner.ops))


class _Buffers:
    """Which values of a program are buffers, which operation reads which of them, and until when each lives."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.root = _roots(program)
        fused = _fused(program, self.root)
        reads = _reads(program, self.root, fused)
        self.steps = [
            (place, op, read)
            for place, (op, read) in enumerate(zip(program.ops, reads, strict=True))
            if op.outputs[0] not in self.root and op.outputs[0] not in fused
        ]
        self.last: dict[int, int] = {}
        for place, op, read in self.steps:
            self.last |= dict.fromkeys(read, place) | dict.fromkeys(op.outputs, place)
        self._last_read = dict(self.last)
        self.last |= {self.of(n): len(program.ops) for n in program.outputs if n is not None}

    def of(self, value: int) -> int:
        """The buffer of a value."""
        return self.root.get(value, value)

    def release(self, value: int) -> None:
        """A result that need not live until the end."""
        buffer = self.of(value)
        self.last[buffer] = self._last_read.get(buffer, len(self.program.ops))

    def callers(self, *, in_place: bool) -> set[int]:
        """Arguments and results, and what becomes a result in place if that may be."""
        program = self.program
        outside = set(program.inputs) | {self.of(n) for n in program.outputs if n is not None}
        for place, op, read in reversed(self.steps if in_place else []):
            out = op.outputs[0]
            if out in outside and is_elementwise(op.eqn):
                same = [b for b in read if self.last[b] == place and program.bytes(b) == program.bytes(out)]
                outside |= set(same[:1])
        return outside


def _sweep(buffers: _Buffers, *, outside: set[int], copied: set[int], end: int) -> int:
    """From the first operation to the last: the most bytes of buffers that are not `outside`."""
    program, last = buffers.program, buffers.last
    ending: dict[int, list[int]] = {}
    for buffer, place in last.items():
        if buffer not in outside:
            ending.setdefault(place, []).append(buffer)
    live = most = 0
    for place, op, read in buffers.steps:
        slices = read & copied
        copied = copied - slices
        grown = sum(program.bytes(n) for n in (*op.outputs, *slices) if n not in outside)
        in_place = [program.bytes(n) for n in op.outputs] if is_elementwise(op.eqn) else []
        inside = sum(program.bytes(n) for n in transposed(op)) if op.name == "dot_general" else 0
        if op.name == "scan":
            inside = _scan_peak(op, program)
            in_place = [program.bytes(n) for n in op.outputs[: scan_parts(op.eqn)[2]]]
        reused = 0
        for buffer in read:
            if last[buffer] == place and buffer not in outside and program.bytes(buffer) in in_place:
                in_place.remove(program.bytes(buffer))
                reused += program.bytes(buffer)
        most = max(most, live + grown - reused + inside)
        live += grown - sum(program.bytes(b) for b in ending.get(place, []))
    return most


def residual_bytes(jaxpr: Jaxpr, divisors: list[int]) -> int:
    """Bytes of the results that are neither arguments nor one another: of a vjp, what the backward pass waits for."""
    program = flatten(jaxpr, divisors)
    root = _roots(program)
    kept = {root.get(n, n) for n in program.outputs if n is not None} - set(program.inputs)
    return sum(program.bytes(n) for n in kept)
