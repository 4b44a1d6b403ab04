"""A traced program as a flat list of operations on numbered buffers: what it computes, and what it holds at most.

`jax.make_jaxpr` says what a program computes, not what XLA keeps in memory. Four rules stand between the two; they are
what any compiler of this kind does, and none has a constant in it:

- calls are inlined; an operation whose results nobody uses is dropped;
- a reshape, a cast to the same type or a sharding constraint that moves nothing is no buffer of its own;
- an elementwise operation or a broadcast with one elementwise or reducing consumer is fused into it, so what it reads
  lives until the consumer runs; one that is a buffer takes over that of an operand of its size that dies there;
- a scan holds its carry and its stacked results from its beginning, and one iteration's buffers on top.

ZeRO appears as sharding constraints: the buffer of a value whose constraint names `fsdp` or `expert` is divided by
their sizes. `tensor` and the rows of the batch are divided beforehand, by tracing the shapes that one device sees.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal  # pyright: ignore[reportPrivateImportUsage]
from jax.sharding import NamedSharding

from dsjax.mesh.layout import ZERO_AXES

_VIEWS = {"reshape", "squeeze", "expand_dims", "name", "stop_gradient", "reshard", "copy", "copy_p"}
# The same where no element is added or lost; a transpose becomes the layout of its operand.
_VIEWS_IF_ALL = {"transpose", "reduce_sum", "pad", "slice", "broadcast_in_dim"}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
_BROADCASTS = {"broadcast_in_dim", "iota"}
# Elementwise is everything of equal shapes but these, which move data or are computed by a routine of their own.
_NOT_ELEMENTWISE = {"dot_general", "scan", "while", "cond", "gather", "scatter", "scatter-add", "sort", "cumsum", "rev"}
_NOT_ELEMENTWISE |= {"dynamic_slice", "dynamic_update_slice", "concatenate", "transpose", "pad", "slice"}
_NOT_ELEMENTWISE |= {"sharding_constraint", "random_bits", "random_fold_in", "random_wrap", "random_unwrap", *_VIEWS}


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: its equation and the numbers of the values that it reads and writes (None: a literal)."""

    eqn: JaxprEqn
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name


@dataclasses.dataclass
class Program:
    """A jaxpr with its calls inlined.

    Attributes:
        ops: in order.
        avals: shape and type of every value, by its number.
        divisors: over how many devices ZeRO splits each value.
        inputs: numbers of the arguments.
        outputs: numbers of the results; None for a constant.
    """

    ops: list[Op]
    avals: list[Any]
    divisors: list[int]
    inputs: list[int]
    outputs: list[int | None]

    def bytes(self, number: int) -> int:
        """Bytes of a value on one device."""
        return aval_bytes(self.avals[number]) // self.divisors[number]


def aval_bytes(aval: Any) -> int:
    """Bytes of a value; a PRNG key counts as the 8 bytes of its data."""
    size = 8 if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else aval.dtype.itemsize
    return math.prod(aval.shape) * size


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _rank(atom: Any) -> int:
    return len(_shape(atom))


def scan_parts(eqn: JaxprEqn) -> tuple[ClosedJaxpr, int, int]:
    """The body of a scan, and how many of its arguments and of its results are not stacked.

    Read off the ranks, in which a stacked array and its slice differ: the parameters' names changed between versions.
    """
    body = eqn.params["jaxpr"]
    whole = [_rank(a) == _rank(b) for a, b in zip(eqn.invars, body.jaxpr.invars, strict=True)]
    carried = [_rank(a) == _rank(b) for a, b in zip(eqn.outvars, body.jaxpr.outvars, strict=True)]
    return body, sum(whole), sum(carried)


def _inner(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr of an equation that merely calls it."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for value in eqn.params.values():
        jaxpr = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(jaxpr, Jaxpr) and len(jaxpr.invars) == len(eqn.invars):
            return jaxpr
    return None


def flatten(jaxpr: Jaxpr, divisors: Sequence[int] | None = None) -> Program:
    """Inline the calls of a jaxpr and drop what is not used.

    Args:
        jaxpr: from `jax.make_jaxpr(f)(...).jaxpr`.
        divisors: over how many devices ZeRO splits each argument; None: each is whole.

    Example:
        >>> jaxpr = jax.make_jaxpr(lambda x: (x @ x) * 2)(jax.ShapeDtypeStruct((4, 4), "float32")).jaxpr
        >>> [op.name for op in flatten(jaxpr).ops]
        ['dot_general', 'mul']
    """
    program = Program([], [], [], [], [])

    def new(aval, divisor: int = 1) -> int:
        program.avals.append(aval)
        program.divisors.append(divisor)
        return len(program.avals) - 1

    def run(jaxpr: Jaxpr, arguments: Iterable[int | None]) -> list[int | None]:
        where = dict(zip(jaxpr.invars, arguments, strict=True)) | {var: new(var.aval) for var in jaxpr.constvars}
        read = lambda atom: None if isinstance(atom, Literal) else where[atom]
        for eqn in jaxpr.eqns:
            inputs = tuple(read(atom) for atom in eqn.invars)
            if (inner := _inner(eqn)) is not None:
                where |= dict(zip(eqn.outvars, run(inner, inputs), strict=True))
                continue
            given = [1 if n is None else program.divisors[n] for n in inputs]
            outputs = tuple(new(var.aval, d) for var, d in zip(eqn.outvars, _divisors(eqn, given), strict=True))
            where |= dict(zip(eqn.outvars, outputs, strict=True))
            program.ops.append(Op(eqn, inputs, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    divisors = [1] * len(jaxpr.invars) if divisors is None else divisors
    program.inputs = [new(var.aval, d) for var, d in zip(jaxpr.invars, divisors, strict=True)]
    program.outputs = run(jaxpr, program.inputs)
    needed, kept = set(program.outputs), []
    for op in reversed(program.ops):
        if needed.intersection(op.outputs):
            needed.update(op.inputs)
            kept.append(op)
    program.ops = kept[::-1]
    return program


def _divisors(eqn: JaxprEqn, given: Sequence[int]) -> list[int]:
    """Over how many devices ZeRO splits the results of an equation."""
    name = eqn.primitive.name
    if name == "sharding_constraint":
        sharding = eqn.params["sharding"]
        assert isinstance(sharding, NamedSharding)
        used = [axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))]
        return [math.prod(sharding.mesh.shape[axis] for axis in used if axis in ZERO_AXES)]
    if name == "scan":
        body, _, _ = scan_parts(eqn)
        inner = flatten(body.jaxpr, given)
        return [1 if n is None else inner.divisors[n] for n in inner.outputs]
    if name in _VIEWS | _VIEWS_IF_ALL or is_elementwise(eqn):
        size = lambda atom: math.prod(_shape(atom))
        return [
            max([d for atom, d in zip(eqn.invars, given, strict=True) if size(atom) == size(out)], default=1)
            for out in eqn.outvars
        ]
    return [1] * len(eqn.outvars)


def is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether each element of the result depends on the same element of the operands only."""
    shape = _shape(eqn.outvars[0])
    shapes = [_shape(atom) for atom in eqn.invars]
    name = eqn.primitive.name
    return name not in _NOT_ELEMENTWISE | _REDUCTIONS | _BROADCASTS and all(s in ((), shape) for s in shapes)


def is_broadcast(eqn: JaxprEqn) -> bool:
    """Whether it can be computed anew wherever it is read, at no cost."""
    return eqn.primitive.name in _BROADCASTS


def is_fusible(eqn: JaxprEqn) -> bool:
    """Whether the compiler computes it inside the loop of its consumer."""
    return is_elementwise(eqn) or is_broadcast(eqn)


def is_loop(eqn: JaxprEqn) -> bool:
    """Whether it is a loop over elements into which a producer can be fused."""
    return is_fusible(eqn) or eqn.primitive.name in _REDUCTIONS


def is_view(op: Op, program: Program) -> bool:
    """Whether its result is its operand's buffer."""
    if len(op.inputs) != 1 or op.inputs[0] is None:
        return False
    source, result = op.inputs[0], op.outputs[0]
    same = program.divisors[source] == program.divisors[result]
    if op.name == "convert_element_type":
        return program.avals[source].dtype == program.avals[result].dtype
    if op.name in _VIEWS_IF_ALL:
        return math.prod(program.avals[source].shape) == math.prod(program.avals[result].shape)
    return same and (op.name in _VIEWS or op.name == "sharding_constraint")


def transposed(op: Op) -> list[int]:
    """Operands of a matrix product that are not in its order, [batch, rows, k] x [batch, k, columns]."""
    (left, right), (_, right_batch) = op.eqn.params["dimension_numbers"]
    rank = _rank(op.eqn.invars[0])
    in_order = (
        tuple(left) == tuple(range(rank - len(left), rank)),
        tuple(right) == tuple(range(len(right_batch), len(right_batch) + len(right))),
    )
    return [n for n, fits in zip(op.inputs, in_order, strict=True) if n is not None and not fits]


def dot_flops(jaxpr: Jaxpr) -> int:
    """Multiplications and additions of all matrix products, those in a scan as often as it runs.

    Example:
        >>> dot_flops(jax.make_jaxpr(lambda x: x @ x)(jax.ShapeDtypeStruct((4, 4), "float32")).jaxpr)
        128
    """
    total = 0
    for op in flatten(jaxpr).ops:
        if op.name == "dot_general":
            (contracting, _), _ = op.eqn.params["dimension_numbers"]
            length = math.prod(_shape(op.eqn.invars[0])[dim] for dim in contracting)
            total += 2 * math.prod(_shape(op.eqn.outvars[0])) * length
        elif op.name == "scan":
            total += op.eqn.params["length"] * dot_flops(op.eqn.params["jaxpr"].jaxpr)
    return total
