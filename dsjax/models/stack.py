"""The stack of layers: segments of repeated patterns, their parameters, and the walk through them.

A segment is a pattern of layers that is repeated: (dense, experts) x 6 is twelve layers, which one scan computes in six
rounds of two. The layers at position j of segment i are one block, `blocks[i][j]`, whose parameters have a first
dimension `repeats`: ('segments', i, j, 'mlp', 'up', 'kernel').
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.layers.feed_forward import FeedForwardSpec


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """The kind of one layer.

    Attributes:
        feed_forward: its perceptron, by the dataclass that models/feed_forwards.py knows.
    """

    feed_forward: FeedForwardSpec


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers that one loop computes.

    Attributes:
        pattern: kinds of the layers of one round, in order.
        repeats: number of rounds.
    """

    pattern: tuple[BlockSpec, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        """The number of layers in all rounds."""
        return len(self.pattern) * self.repeats


Segments = tuple[Segment, ...]


def cut(layers: Sequence[BlockSpec], lengths: Iterable[int]) -> Segments:
    """Cut layers into segments of so many each; a segment's pattern is the shortest that gives its layers.

    Example:
        >>> from dsjax.layers.feed_forward import DenseSpec
        >>> a, b = BlockSpec(DenseSpec(8)), BlockSpec(DenseSpec(16))
        >>> [(len(segment.pattern), segment.repeats) for segment in cut([a, a, b, a, b, a, a], (1, 4, 2))]
        [(1, 1), (2, 2), (1, 2)]
    """
    segments, first = [], 0
    for length in lengths:
        part = tuple(layers[first : first + length])
        size = next(n for n in range(1, length + 1) if length % n == 0 and part == part[:n] * (length // n))
        segments.append(Segment(part[:size], length // size))
        first += length
    assert first == len(layers)
    return tuple(segments)


def layer_numbers(segments: Segments) -> list[list[range]]:
    """Numbers of the layers at each position of each segment.

    Example:
        >>> from dsjax.layers.feed_forward import DenseSpec
        >>> a, b = BlockSpec(DenseSpec(8)), BlockSpec(DenseSpec(16))
        >>> layer_numbers((Segment((a,), 1), Segment((a, b), 3)))
        [[range(0, 1)], [range(1, 7, 2), range(2, 7, 2)]]
    """
    ends = list(itertools.accumulate((segment.num_layers for segment in segments), initial=0))
    return [
        [range(first + j, end, len(segment.pattern)) for j in range(len(segment.pattern))]
        for segment, (first, end) in zip(segments, itertools.pairwise(ends), strict=True)
    ]


def check_dropping(segments: Segments, dropping: range) -> None:
    """Refuse segments with layers that drop tokens and layers that do not: one loop computes all layers of a segment.

    Args:
        segments: of the model.
        dropping: numbers of the layers that see some tokens only (random-LTD).

    Raises:
        ValueError: names the segment, and lengths that work.
    """
    lengths, first = [segment.num_layers for segment in segments], 0
    for length in lengths:
        inside = sum(number in dropping for number in range(first, first + length))
        if 0 < inside < length:
            working = [n for n in (dropping.start, len(dropping), sum(lengths) - dropping.stop) if n]
            raise ValueError(
                f"random_ltd drops tokens in layers {dropping.start} to {dropping.stop - 1}, but model.segments "
                f"{lengths} computes layers {first} to {first + length - 1} as one segment; set model.segments to "
                f"{working}, or change random_ltd.first_layers and last_layers"
            )
        first += length


# Parameters


def make_stack(make: Callable[[BlockSpec, Any], nnx.Module], segments: Segments) -> nnx.List:
    """Blocks [segment][position] with fresh parameters of all their layers.

    Args:
        make: (kind, number of a layer) -> its block.
        segments: of the model.
    """
    graphs: dict[BlockSpec, nnx.GraphDef] = {}  # one a kind: finding it takes as long as making a block
    stack = nnx.List([])
    for segment, numbers in zip(segments, layer_numbers(segments), strict=True):
        blocks = nnx.List([])
        for kind, layers in zip(segment.pattern, numbers, strict=True):
            if kind not in graphs:
                graphs[kind] = nnx.graphdef(nnx.eval_shape(lambda kind=kind: make(kind, 0)))
            blocks.append(_layers_of(partial(make, kind), graphs[kind], layers))
        stack.append(blocks)
    return stack


def _layers_of(make: Callable[[Any], nnx.Module], graph: nnx.GraphDef, numbers: range) -> nnx.Module:
    """A block whose parameters hold these layers along a first dimension."""
    draw = lambda number: nnx.to_pure_dict(nnx.state(make(number)))
    if len(numbers) == 1:  # a batch of one draws the same numbers, but takes three times as long to compile
        return nnx.merge(graph, jax.tree.map(lambda x: x[None], draw(numbers[0])))
    return nnx.merge(graph, jax.vmap(draw)(as_array(numbers)))


def as_array(numbers: range) -> Int[Array, " n"]:
    """Numbers of layers as an array of the program."""
    return jnp.arange(numbers.start, numbers.stop, None if numbers.step == 1 else numbers.step)


# The walk

Layer = Callable[[Any, Float[Array, "B T D"], Int[Array, ""], Any], tuple[Float[Array, "B T D"], Any]]
"""(block, its input, its number, what it is given) -> (its output, what it gives besides)."""


def through(
    blocks: Sequence[Sequence[nnx.Module]],
    segments: Segments,
    x_BTD: Float[Array, "B T D"],
    layer: Layer,
    *,
    given: Sequence[Sequence[Any]] | None = None,
    wrap: Callable[[Callable, bool], Callable] = lambda body, scanned: body,
) -> tuple[Float[Array, "B T D"], list[tuple[Any, ...]]]:
    """Pass x through all layers, and collect what each of them gives besides.

    Args:
        blocks: [segment][position], their parameters [repeats, ...].
        segments: of the model.
        x_BTD: input of the first layer.
        layer: computes one of them.
        given: trees [segment][position] whose leaves have a first dimension `repeats`; None: nothing is given.
        wrap: makes one layer's function another one (rematerialisation); is told whether it is inside a scan.

    Returns:
        the last layer's output, and what the layers gave: trees [segment][position], leaves [repeats, ...].
    """
    if given is None:
        given = [(None,) * len(segment.pattern) for segment in segments]
    collected = []
    for of_segment, segment, numbers, extra in zip(blocks, segments, layer_numbers(segments), given, strict=True):
        scanned = segment.repeats > 1
        parts = [nnx.split(block) for block in of_segment]
        layers = [wrap(partial(_one_layer, layer, graph), scanned) for graph, _ in parts]
        inputs = tuple(zip(map(as_array, numbers), (parameters for _, parameters in parts), extra, strict=True))
        pattern = partial(_one_round, layers)
        if scanned:
            x_BTD, results = jax.lax.scan(pattern, x_BTD, inputs)
        else:  # sliced by a loop, weights and cache would be copied
            x_BTD, results = pattern(x_BTD, jax.tree.map(lambda leaf: leaf[0], inputs))
            results = jax.tree.map(lambda leaf: leaf[None], results)
        collected.append(results)
    return x_BTD, collected


def _one_layer(layer: Layer, graph: nnx.GraphDef, x_BTD: Float[Array, "B T D"], inputs: tuple[Any, Any, Any]):
    number, parameters, given = inputs
    return layer(nnx.merge(graph, parameters), x_BTD, number, given)


def _one_round(layers: Sequence[Callable], x_BTD: Float[Array, "B T D"], inputs: tuple[Any, ...]):
    """All layers of a pattern, one after the other."""
    results = []
    for layer, own in zip(layers, inputs, strict=True):
        x_BTD, result = layer(x_BTD, own)
        results.append(result)
    return x_BTD, tuple(results)


def by_layer(collected: Sequence[Sequence[Mapping[str, Array]]]) -> dict[str, Array]:
    """Statistics of a walk by name: [number of layers that have it, ...], in the order of the layers.

    Example:
        >>> first, second = {"a": jnp.array([0, 2])}, {"a": jnp.array([1, 3]), "b": jnp.array([8, 9])}
        >>> {name: x.tolist() for name, x in by_layer([({"a": jnp.array([7])},), (first, second)]).items()}
        {'a': [7, 0, 1, 2, 3], 'b': [8, 9]}
    """
    found: dict[str, list[Array]] = {}
    for segment in collected:
        for name in dict.fromkeys(name for statistics in segment for name in statistics):
            parts = [statistics[name] for statistics in segment if name in statistics]
            rounds = parts[0] if len(parts) == 1 else jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
            found.setdefault(name, []).append(rounds)
    return {name: parts[0] if len(parts) == 1 else jnp.concatenate(parts) for name, parts in found.items()}
