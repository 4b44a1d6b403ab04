"""The most that a traced program holds at once, beside its arguments and results; see plan_jaxpr.py for the rules."""

import jax
from jax.extend.core import Jaxpr

from dsjax.train.plan_jaxpr import Op, Program, flatten, is_elementwise, is_fusible, is_loop, is_view, scan_parts


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
        if op.outputs[0] in root:
            continue
        for number in {n for n in op.inputs if n is not None}:
            users.setdefault(root.get(number, number), []).append(op)
    kept = {root.get(n, n) for n in program.outputs if n is not None}
    fused = set()
    for op in program.ops:
        out = op.outputs[0]
        if out not in root and out not in kept and is_fusible(op.eqn):
            consumers = users.get(out, [])
            if all(is_loop(user.eqn) for user in consumers) and (len(consumers) <= 1 or op.name in ("broadcast_in_dim", "iota")):
                fused.add(out)
    return fused


def _reads(program: Program, root: dict[int, int], fused: set[int]) -> list[set[int]]:
    """For every operation the buffers that it reads, through what is fused into it."""
    through: dict[int, set[int]] = {}
    reads = []
    for op in program.ops:
        found: set[int] = set()
        for number in op.inputs:
            if number is not None:
                buffer = root.get(number, number)
                found |= through.get(buffer, {buffer})
        if op.outputs[0] in fused:
            through[op.outputs[0]] = found
            found = set()
        reads.append(found)
    return reads


def peak_bytes(program: Program, *, results_are_temporary: bool = False) -> int:
    """Bytes held at most, without arguments, and without results unless asked for.

    Example:
        >>> f = lambda x: ((x @ x) @ x).sum()
        >>> jaxpr = jax.make_jaxpr(f)(jax.ShapeDtypeStruct((4, 4), "float32")).jaxpr
        >>> peak_bytes(flatten(jaxpr))
        128
    """
    root = _roots(program)
    fused = _fused(program, root)
    reads = _reads(program, root, fused)
    last: dict[int, int] = {}
    for place, (op, buffers) in enumerate(zip(program.ops, reads, strict=True)):
        if op.outputs[0] in root or op.outputs[0] in fused:
            continue
        last |= {buffer: place for buffer in buffers} | {n: place for n in op.outputs}
    for n in program.outputs:
        if n is not None:
            last[root.get(n, n)] = len(program.ops)
    outside = set(program.inputs)
    if not results_are_temporary:
        outside |= {root.get(n, n) for n in program.outputs if n is not None}
        for place, (op, buffers) in reversed(list(enumerate(zip(program.ops, reads, strict=True)))):
            if op.outputs[0] in outside and op.outputs[0] not in root and is_elementwise(op.eqn):
                same = [b for b in buffers if last[b] == place and program.bytes(b) == program.bytes(op.outputs[0])]
                outside |= set(same[:1])
    ending: dict[int, list[int]] = {}
    for buffer, place in last.items():
        if buffer not in outside:
            ending.setdefault(place, []).append(buffer)
    live = most = 0
    for place, (op, buffers) in enumerate(zip(program.ops, reads, strict=True)):
        if op.outputs[0] in root or op.outputs[0] in fused:
            continue
        dying = [b for b in buffers if last[b] == place and b not in outside]
        grown = sum(program.bytes(n) for n in op.outputs if n not in outside)
        inside = 0
        if op.name == "scan":
            inside = scan_peak(op, program)
            carried = scan_parts(op.eqn)[2]
            sizes = [program.bytes(n) for n in op.outputs[:carried]]
        else:
            sizes = [program.bytes(n) for n in op.outputs] if is_elementwise(op.eqn) else []
        # What is computed in place takes over the buffer of an operand that is not read again.
        reused = 0
        for buffer in dying:
            if program.bytes(buffer) in sizes:
                sizes.remove(program.bytes(buffer))
                reused += program.bytes(buffer)
        most = max(most, live + grown - reused + inside)
        live += grown - sum(program.bytes(b) for b in ending.get(place, []))
    return most


def scan_peak(op: Op, program: Program) -> int:
    """Bytes that one iteration holds beside the loop's arguments, carry and stacked results."""
    body, whole, _ = scan_parts(op.eqn)
    given = [1 if n is None else program.divisors[n] for n in op.inputs]
    inner = flatten(body.jaxpr, given)
    # A slice of a stacked argument is copied out of it; the rest is read where it lies.
    slices = set(inner.inputs[whole:])
    first = {n: place for place, o in reversed(list(enumerate(inner.ops))) for n in o.inputs if n in slices}
    extra = sum(inner.bytes(n) for n in slices if n in first)
    return peak_bytes(inner, results_are_temporary=True) + extra


def residual_bytes(jaxpr: Jaxpr, divisors: list[int]) -> int:
    """Bytes of the results that are neither arguments nor one another: of a vjp, what the backward pass waits for."""
    program = flatten(jaxpr, divisors)
    root = _roots(program)
    kept = {root.get(n, n) for n in program.outputs if n is not None} - set(program.inputs)
    return sum(program.bytes(n) for n in kept)
