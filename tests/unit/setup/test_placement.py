"""Where rows of a global batch go."""

import jax
import numpy as np
import pytest

from dsjax.mesh.config import MeshConfig
from dsjax.setup.placement import evaluation_placement, training_placement
from tests.helpers import MESHES, make_rows, make_training


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_keep_their_order(mesh_name, accumulation):
    """[W, A, b] read in order is the global batch; each device holds its own rows only."""
    layout, rows = make_training(MESHES[mesh_name]).layout, make_rows(16)
    placement = training_placement(layout, batch_size=16, accumulation=accumulation)
    batch = placement(rows)
    workers, shards = layout.mesh.shape["data"], layout.size(("fsdp", "expert"))
    for name, value in rows.items():
        placed = batch[name]
        assert placed.shape == (workers, accumulation, 16 // (workers * accumulation), 16)
        assert placed.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(placed).reshape(value.shape), value)
        local = placed.addressable_shards[0].data.shape
        assert local == (1, accumulation, 16 // (workers * accumulation * shards), 16)
    np.testing.assert_array_equal(placement.positions, np.arange(16))


def test_a_batch_that_cannot_be_cut():
    layout = make_training(MeshConfig(data=2, fsdp=2, tensor=2)).layout
    message = (
        r"train.batch_size = 18 cannot be cut into data 2 x accumulation 3 x \(fsdp \* expert\) 2 = 12 equal parts; "
        r"use a multiple of 12, such as 12 or 24"
    )
    with pytest.raises(ValueError, match=message):
        training_placement(layout, batch_size=18, accumulation=3)
    with pytest.raises(ValueError, match=r"use a multiple of 12, such as 12$"):
        training_placement(layout, batch_size=5, accumulation=3)
    with pytest.raises(ValueError, match=r"evaluate.batch_size = 6 must be divisible by data \* fsdp \* expert = 4"):
        evaluation_placement(layout, batch_size=6)


def test_evaluation_rows_lie_over_all_batch_axes():
    layout, rows = make_training(MESHES["all"]).layout, make_rows(8)
    placed = evaluation_placement(layout, batch_size=8)(rows)["tokens"]
    assert placed.addressable_shards[0].data.shape == (2, 16)
    np.testing.assert_array_equal(placed, rows["tokens"])
    assert len({shard.index for shard in jax.tree.leaves(placed.addressable_shards)}) == 4
