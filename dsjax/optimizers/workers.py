"""Compressed communication of the 1-bit optimizers: trees of tensors on one device, seen as workers' parts.

All of it runs inside a manual shard_map: an array is this device's part. A tensor is one layer's tensor also where a
stack of layers is one array; `rows` makes [S, n] of every leaf, S layers (1 if it is no stack) of n values.

Arrays that differ between workers carry a dimension W, sharded over the workers' axis, behind the dimension of a stack:
[W, ...] or [S, W, ...]. No array that is marked as replicated differs between devices.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsjax.collectives.one_bit import Feedback, Scheme, one_bit_mean, reset_errors
from dsjax.collectives.shards import Rows, Shards, axes_of
from dsjax.mesh.tree import Tree

Granularity = Literal["fused", "tensor", "group"]


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers of an optimizer, and how its tensors lie on them.

    Attributes:
        axis: mesh axis along which they are counted.
        num: how many there are, W.
        model_axes: the mesh's other axes and their sizes; tensors may be split over them.
        specs: tree of the parameters' PartitionSpecs over model_axes; None: every device holds whole tensors.
        leading: tree of ints, how many of a leaf's first dimensions count tensors (layers, experts); None: nowhere any.
        granularity: "fused": a scale for each tensor, all in one message. "tensor": the same numbers, a message for
            each tensor. "group": all tensors of a device joined to one, with one scale.
        scheme: scales and padding of the one-bit mean.
    """

    axis: str
    num: int
    model_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    specs: Tree = None
    leading: Tree = None
    granularity: Granularity = "fused"
    scheme: Scheme = dataclasses.field(default_factory=Scheme)

    def stacks(self, tree: Tree) -> list[int]:
        """Number of each leaf's first dimensions that count tensors."""
        leaves = jax.tree.leaves(tree)
        return [0] * len(leaves) if self.leading is None else jax.tree.leaves(self.leading)

    def spec_leaves(self, tree: Tree) -> list[PartitionSpec]:
        """The leaves' specs over model_axes."""
        if self.specs is None:
            return [PartitionSpec()] * len(jax.tree.leaves(tree))
        return jax.tree.leaves(self.specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def spec_tree(self, tree: Tree) -> Tree:
        """The same as a tree."""
        return jax.tree.unflatten(jax.tree.structure(tree), self.spec_leaves(tree))

    def each(self, tree: Tree, value: float) -> Tree:
        """A value for every tensor, in the shape of the leaf's leading dimensions; float32."""
        leaves, treedef = jax.tree.flatten(tree)
        shapes = [x.shape[:s] for x, s in zip(leaves, self.stacks(tree), strict=True)]
        return jax.tree.unflatten(treedef, [jnp.full(shape, value, jnp.float32) for shape in shapes])

    def shards(self, tree: Tree) -> Shards:
        """The split of the leaves over model_axes."""
        return Shards.of(self.spec_leaves(tree), self.model_axes, self.stacks(tree))

    def specs_of_each(self, tree: Tree) -> Tree:
        """The specs of `each`: experts lie where their tensors lie."""
        firsts = [spec[:s] for spec, s in zip(self.spec_leaves(tree), self.stacks(tree), strict=True)]
        specs = [PartitionSpec(*first) if any(first) else PartitionSpec() for first in firsts]
        return jax.tree.unflatten(jax.tree.structure(tree), specs)

    def of_all(self, each: Tree) -> Tree:
        """One value of every tensor, in the leaves' leading dimensions: also of the tensors that other devices hold."""
        pairs = zip(jax.tree.leaves(each), self.spec_leaves(each), strict=True)
        return jax.tree.unflatten(jax.tree.structure(each), [self._gathered(x, spec) for x, spec in pairs])

    def _gathered(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        for dim, entry in enumerate(spec[: x.ndim]):
            for axis in reversed(axes_of((entry,))):
                if self.model_axes.get(axis, 1) > 1:
                    x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
        return x

    def rows(self, tree: Tree) -> Rows:
        """Every leaf as [S, n]."""
        leaves = jax.tree.leaves(tree)
        return [x.reshape(math.prod(x.shape[:s]), -1) for x, s in zip(leaves, self.stacks(tree), strict=True)]

    def unrows(self, rows: Rows, like: Tree) -> Tree:
        """Rows [S, n] in the shapes of a tree's leaves; rows [S] in the shapes of their leading dimensions."""
        leaves, treedef = jax.tree.flatten(like)
        shaped = [
            row.reshape(x.shape if row.ndim == 2 else x.shape[:s])
            for row, x, s in zip(rows, leaves, self.stacks(like), strict=True)
        ]
        return jax.tree.unflatten(treedef, shaped)

    def spread(self, values: Tree, like: Tree) -> Tree:
        """One value per tensor, [S] or a scalar, shaped so that it multiplies the leaves of `like`."""
        return jax.tree.map(lambda v, x: v.reshape(v.shape + (1,) * (x.ndim - v.ndim)), values, like)

    def sums(self, *trees: Tree) -> list[Tree]:
        """The sum of every tensor, over all devices that hold a part of it: trees of [S] or scalars; one collective."""
        rows = [jnp.sum(row.astype(jnp.float32), axis=1) for tree in trees for row in self.rows(tree)]
        return self._split(self.shards(trees[0]).sums(rows), trees)

    def maxima(self, tree: Tree) -> Tree:
        """The largest value of every tensor, likewise."""
        rows = [jnp.max(row, axis=1) for row in self.rows(tree)]
        return self._split(self.shards(tree).maxima(rows), (tree,))[0]

    def _split(self, rows: Rows, trees: tuple[Tree, ...]) -> list[Tree]:
        step = len(rows) // len(trees)
        return [self.unrows(rows[i * step : (i + 1) * step], tree) for i, tree in enumerate(trees)]

    def norms(self, *trees: Tree) -> list[Tree]:
        """The Euclidean norm of every tensor, likewise."""
        squares = self.sums(*(jax.tree.map(jnp.square, tree) for tree in trees))
        return [jax.tree.map(jnp.sqrt, tree) for tree in squares]

    def sizes(self, tree: Tree) -> Tree:
        """The number of values of every tensor (one layer's), all parts together, as Python ints."""
        sizes = [row.shape[1] * part for row, part in zip(self.rows(tree), self.shards(tree).parts, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(tree), sizes)

    def mean(self, tree: Tree) -> Tree:
        """The mean over the workers, sent in float32."""
        return jax.tree.map(lambda x: jax.lax.pmean(x, self.axis), tree)

    def mean_of_scalars(self, *values: jax.Array) -> list[jax.Array]:
        """Means of scalars over the workers: one collective for all."""
        return list(jax.lax.pmean(jnp.stack(values), self.axis))

    # What is kept per worker

    def own(self, tree: Tree) -> Tree:
        """This worker's part of arrays with a dimension W: without it."""
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, [x.squeeze(s) for x, s in zip(leaves, self.stacks(tree), strict=True)])

    def kept(self, tree: Tree) -> Tree:
        """The inverse."""
        leaves, treedef = jax.tree.flatten(tree)
        wide = [jnp.expand_dims(x, s) for x, s in zip(leaves, self.stacks(tree), strict=True)]
        return jax.tree.unflatten(treedef, wide)

    def zeros(self, params: Tree) -> Tree:
        """Zeros for every worker, in global shapes: [W, ...], of a stack [S, W, ...]; float32."""
        leaves, treedef = jax.tree.flatten(params)
        shapes = [(*x.shape[:s], self.num, *x.shape[s:]) for x, s in zip(leaves, self.stacks(params), strict=True)]
        return jax.tree.unflatten(treedef, [jnp.zeros(shape, jnp.float32) for shape in shapes])

    def specs_of_kept(self, params: Tree) -> Tree:
        """The specs of `zeros`."""
        leaves, treedef = jax.tree.flatten(params)
        found = []
        for x, s, spec in zip(leaves, self.stacks(params), self.spec_leaves(params), strict=True):
            entries = (*spec, *[None] * (x.ndim - len(spec)))
            found.append(PartitionSpec(*entries[:s], self.axis, *entries[s:]))
        return jax.tree.unflatten(treedef, found)

    # The one-bit mean

    def feedback(self, params: Tree) -> Feedback:
        """Feedback without errors, in global shapes.

        [W, M, N] for each tensor ([S, W, M, N] for a stack), M devices of a worker among which a tensor is split, N its
        padded part; scales [W].
        """
        leaves, treedef = jax.tree.flatten(params)
        shards, all_devices = self.shards(params), math.prod(self.model_axes.values())
        lengths = [
            math.prod(x.shape[s:]) // part for x, s, part in zip(leaves, self.stacks(params), shards.parts, strict=True)
        ]
        stacks = [x.shape[:s] for x, s in zip(leaves, self.stacks(params), strict=True)]
        devices = [part * copies for part, copies in zip(shards.parts, shards.copies, strict=True)]
        if self.granularity == "group":
            held = [n * math.prod(stack) for n, stack in zip(lengths, stacks, strict=True)]
            whole = sum(n * m // all_devices for n, m in zip(held, devices, strict=True))
            lengths, stacks, devices, treedef = [whole], [()], [all_devices], jax.tree.structure([0])
        sizes = [self.scheme.padded(n, self.num) for n in lengths]
        scale = lambda: jax.tree.unflatten(treedef, [jnp.zeros((*stack, self.num)) for stack in stacks])
        carry = lambda share: jax.tree.unflatten(
            treedef,
            [jnp.zeros((*s, self.num, m, n // share)) for s, m, n in zip(stacks, devices, sizes, strict=True)],
        )
        return Feedback(carry(1), scale(), carry(self.num), scale())

    def feedback_specs(self, params: Tree) -> Feedback:
        """The specs of `feedback`."""
        treedef = jax.tree.structure(params)
        counts = zip(self.spec_leaves(params), self.stacks(params), strict=True)
        stacks = [(*spec[:s], *[None] * (s - len(spec))) for spec, s in counts]
        if self.granularity == "group":
            stacks, treedef = [()], jax.tree.structure([0])
        others = [tuple(axis for axis in self.model_axes if axis not in axes_of(stack)) or None for stack in stacks]
        scale = jax.tree.unflatten(treedef, [PartitionSpec(*stack, self.axis) for stack in stacks])
        carries = [PartitionSpec(*stack, self.axis, rest, None) for stack, rest in zip(stacks, others, strict=True)]
        carry = jax.tree.unflatten(treedef, carries)
        return Feedback(carry, scale, carry, scale)

    def one_bit_mean(self, tree: Tree, feedback: Feedback, masks: Tree | None) -> tuple[Tree, Feedback]:
        """The mean over the workers at one bit a value.

        Args:
            tree: this worker's tensors, float32.
            feedback: as it is kept, [.., 1, 1, N].
            masks: tree of bools, False for values that are left out; None: no value is.
        """
        tensors, shards = self.rows(tree), self.shards(tree)
        if self.granularity == "group":
            # A part that several devices hold counts once for each of them, so that one psum serves.
            shards = Shards(shards.axes, (math.prod(self.model_axes.values()),), (1,), ((),))
            mask = None if masks is None else _joined(self.rows(masks))
            (mean,), feedback = self._call([_joined(tensors)], feedback, [mask], shards)
            return self.unrows(_apart(mean, tensors), tree), feedback
        chosen = [None] * len(tensors) if masks is None else self.rows(masks)
        means, feedback = self._call(tensors, feedback, chosen, shards)
        return self.unrows(means, tree), feedback

    def tail(self, params: Tree) -> jax.Array:
        """The padding behind a group of tensors, which DeepSpeed 0.19.6 takes for values: zeros at first."""
        size = sum(x.size for x in jax.tree.leaves(params))
        return jnp.zeros(self.scheme.padded(size, self.num) - size)

    def one_bit_mean_with_tail(
        self, tree: Tree, tail: jax.Array, feedback: Feedback
    ) -> tuple[Tree, jax.Array, Feedback]:
        """The same of a group and the padding behind it, which comes back changed."""
        tensors = self.rows(tree)
        joined = jnp.concatenate([_joined(tensors), tail[None]], axis=1)
        (mean,), feedback = self._call([joined], feedback, [None], Shards.whole(1))
        return self.unrows(_apart(mean, tensors), tree), mean[0, mean.shape[1] - tail.size :], feedback

    def reset_errors(self, feedback: Feedback, where: Tree) -> Feedback:
        """Feedback without errors for the values chosen by a tree of bools."""
        if self.num == 1:
            return feedback
        rows = self.rows(where)
        rows = [_joined(rows)] if self.granularity == "group" else rows
        local = self._local(feedback, rows)
        return self._kept(reset_errors(local, rows, axis=self.axis, num_workers=self.num), feedback)

    def _call(self, tensors: Rows, feedback: Feedback, masks: list, shards: Shards) -> tuple[Rows, Feedback]:
        """The collective on rows: all in one call, or one call each."""
        local, how = self._local(feedback, tensors), {"axis": self.axis, "num_workers": self.num, "scheme": self.scheme}
        if self.granularity != "tensor":
            means, local = one_bit_mean(tensors, local, masks=masks, shards=shards, **how)
            return means, self._kept(local, feedback)
        means, after = [], []
        for i, x in enumerate(tensors):
            one = jax.tree.map(lambda rows, i=i: rows[i : i + 1], local, is_leaf=lambda leaf: isinstance(leaf, list))
            (mean,), one = one_bit_mean([x], one, masks=masks[i : i + 1], shards=shards.only(i), **how)
            means.append(mean)
            after.append(jax.tree.leaves(one))
        count = len(tensors)
        flat = [after[i % count][i // count] for i in range(4 * count)]
        return means, self._kept(jax.tree.unflatten(jax.tree.structure(local), flat), feedback)

    def _local(self, feedback: Feedback, rows: Rows) -> Feedback:
        """Feedback as it is kept -> as lists of rows [S, N] and [S]."""
        layers = [row.shape[0] for row in rows]
        shaped = lambda tree, *rest: [x.reshape(s, *rest) for x, s in zip(jax.tree.leaves(tree), layers, strict=True)]
        return Feedback(
            shaped(feedback.worker, -1), shaped(feedback.worker_scale), shaped(feedback.server, -1),
            shaped(feedback.server_scale),
        )  # fmt: skip

    def _kept(self, local: Feedback, like: Feedback) -> Feedback:
        """The inverse."""
        leaves, treedef = jax.tree.flatten(like)
        shaped = [x.reshape(old.shape) for x, old in zip(jax.tree.leaves(local), leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)


def _joined(rows: Rows) -> jax.Array:
    """All tensors as one, [1, n]."""
    return jnp.concatenate([row.ravel() for row in rows])[None]


def _apart(joined: jax.Array, like: Rows) -> Rows:
    """The inverse."""
    ends = [sum(row.size for row in like[: i + 1]) for i in range(len(like))]
    return [joined[0, end - row.size : end].reshape(row.shape) for row, end in zip(like, ends, strict=True)]


def keep(accept: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` where a step is accepted, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(accept, n, o), new, old)


def only_if(accept: jax.Array, changes: Tree) -> Tree:
    """Changes of a step that is accepted, else zeros."""
    return jax.tree.map(lambda change: jnp.where(accept, change, 0), changes)
