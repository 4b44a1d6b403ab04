"""Names of tensors outside the program: they do not know how the layers were cut into segments."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from dsjax.models.families.build import abstract, segments_of
from dsjax.models.naming import abstract_named, from_named, leaf_names, to_named
from dsjax.models.tree import ModelTree
from tests.helpers import MESHES, TINY, from_flat, make_params, make_training

LAYERS = 5


def tree_of(cuts):
    edges = [0, *sorted(cuts), LAYERS]
    segments = tuple(b - a for a, b in itertools.pairwise(edges))
    return ModelTree.of(abstract(dataclasses.replace(TINY, num_layers=LAYERS, segments=segments)))


@settings(deadline=None, max_examples=8)
@given(st.sets(st.integers(1, LAYERS - 1)), st.sets(st.integers(1, LAYERS - 1)))
def test_a_tree_may_be_cut_anew(cuts, other_cuts):
    """Down to names from one segmentation, up to another, down again: the same tensors under the same names."""
    named = make_params(dataclasses.replace(TINY, num_layers=LAYERS, segments=()))
    one, other = tree_of(cuts), tree_of(other_cuts)
    tree = from_flat(named, one.shapes, one.segments)
    assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, one.shapes)
    down = {
        name: leaf[i] if is_stack else leaf
        for (names, is_stack), leaf in zip(leaf_names(tree, one.segments), jax.tree.leaves(tree), strict=True)
        for i, name in enumerate(names)
    }
    again = from_flat(down, other.shapes, other.segments)
    assert down.keys() == named.keys()
    jax.tree.map(np.testing.assert_array_equal, again, from_flat(named, other.shapes, other.segments))


@pytest.mark.parametrize("segments", [(5,), (1, 3, 1), (2, 3)])
def test_on_the_mesh_and_back(segments):
    """Under ZeRO-3 and tensor parallelism, from one segmentation to another, every tensor on its shards."""
    config = dataclasses.replace(TINY, num_layers=LAYERS, segments=segments)
    here, there = (
        make_training(MESHES["all"], config),
        make_training(MESHES["all"], dataclasses.replace(config, segments=())),
    )
    params = here.params()
    named = to_named(params, segments_of(config))
    expected = abstract_named(params, segments_of(config))
    assert named.keys() == expected.keys() == make_params(config).keys()
    for name, value in named.items():
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype)
        assert expected[name].sharding.spec == PartitionSpec(*expected[name].sharding.spec)
        np.testing.assert_array_equal(value, make_params(config)[name])
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), there.model.shapes, there.shardings.params
    )
    joined = from_named(dict(named).pop, shapes, segments_of(there.config))
    jax.tree.map(np.testing.assert_array_equal, joined, there.params())
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), joined, there.shardings.params)
    assert all(jax.tree.leaves(same))


def test_names_survive_donation():
    """What `to_named` gives are new buffers: the step may donate the state while they are being written."""
    training = make_training(MESHES["all"])
    params = training.params()
    named = to_named(params, segments_of(TINY))
    jax.tree.map(lambda leaf: leaf.delete(), params)
    for name, value in make_params(TINY).items():
        np.testing.assert_array_equal(named[name], value)


def test_a_state_has_names_for_everything():
    training = make_training(MESHES["all"], ema_decay=0.5)
    named = to_named(training.state(), segments_of(TINY))
    # Parameters, two moments and the average of each; the step, Adam's count and the key.
    assert len(named) == 4 * len(make_params(TINY)) + 3
    assert {"step", "key", "params.layers.1.mlp.up.kernel", "ema.layers.0.attention.qkv.bias"} <= named.keys()
