"""Trip counts of the `while` loops of a compiled program.

XLA records it for the loops that it understood (`known_trip_count`). Where it did not, a loop of the form
`i = init; while i < limit: i += step` with constants is read from the text here: the condition's root compares one
element of the loop's tuple with a constant, the body adds a constant to that element, and the loop starts from a
constant. The operations may sit inside fusions, so each is followed through the computations that it calls.
"""

import dataclasses
import re
from collections.abc import Callable

from dsjax.collectives.hlo_text import Computation, Instruction, Module

_RECORDED = re.compile(r'\\?"known_trip_count\\?":\s*\{\s*\\?"n\\?":\s*\\?"(\d+)\\?"')
_SCALAR = re.compile(r"(pred|[su]\d+)\[\]")


@dataclasses.dataclass(frozen=True, slots=True)
class _Element:
    """An element of the tuple that the loop carries."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Sum:
    left: "_Value"
    right: "_Value"


@dataclasses.dataclass(frozen=True, slots=True)
class _Comparison:
    direction: str
    left: "_Value"
    right: "_Value"


# A constant, one of the above, or None for whatever a loop counter does not need.
type _Value = int | _Element | _Sum | _Comparison | None


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Executions of the body of `loop`, an instruction of `computation`; None if they cannot be read."""
    if match := _RECORDED.search(loop.rest):
        return int(match[1])
    condition, body = (module.computations[loop.called[part][0]] for part in ("condition", "body"))
    test = _resolve(module, condition, condition.root.name)
    if not isinstance(test, _Comparison):
        return None
    direction, counter, limit = test.direction, test.left, test.right
    if isinstance(counter, int):  # limit > i says i < limit
        direction, counter, limit = {"GT": "LT", "GE": "LE"}.get(direction, ""), limit, counter
    if direction not in ("LT", "LE") or not isinstance(counter, _Element) or not isinstance(limit, int):
        return None
    init = _resolve(module, computation, loop.operands[0], counter.index)
    update = _resolve(module, body, body.root.name, counter.index)
    if not isinstance(init, int) or not isinstance(update, _Sum):
        return None
    step = update.right if update.left == counter else update.left if update.right == counter else None
    if not isinstance(step, int) or step < 1:
        return None
    return max(0, -(-(limit - init + (direction == "LE")) // step))


def _resolve(
    module: Module,
    computation: Computation,
    name: str,
    index: int | None = None,
    arguments: Callable[[int, int | None], _Value] | None = None,
) -> _Value:
    """The value of a scalar of a computation, or with `index` of that element of a tuple.

    Inside a fusion or call `arguments(k, index)` says what its k-th parameter is; without it the computation is part of
    a loop, and its parameter is the loop's tuple. Floating-point values are not followed: a body may be very deep.
    """
    instruction = computation.instructions.get(name)
    if instruction is None or (index is None and not _SCALAR.match(instruction.shape)):
        return None

    def operand(position: int, index: int | None = None) -> _Value:
        return _resolve(module, computation, instruction.operands[position], index, arguments)

    match instruction.opcode:
        case "constant":
            literal = instruction.operands[0]
            return int(literal) if re.fullmatch(r"-?\d+", literal) else None
        case "parameter" if arguments:
            return arguments(int(instruction.operands[0]), index)
        case "parameter":
            return None if index is None else _Element(index)
        case "get-tuple-element" if index is None:
            number = re.search(r"\bindex=(\d+)", instruction.attributes)
            return operand(0, int(number[1])) if number else None
        case "tuple" if index is not None:
            return operand(index)
        case "copy" | "bitcast" | "reshape" | "convert":
            return operand(0, index)
        case "add":
            return _Sum(operand(0), operand(1))
        case "compare":
            direction = re.search(r"\bdirection=(\w+)", instruction.attributes)
            return _Comparison(direction[1] if direction else "", operand(0), operand(1))
        case "fusion" | "call":
            called = instruction.called.get("calls") or instruction.called.get("to_apply")
            inner = module.computations[called[0]] if called else None
            return _resolve(module, inner, inner.root.name, index, operand) if inner else None
    return None
