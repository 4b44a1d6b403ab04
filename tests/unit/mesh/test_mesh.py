"""Axis sizes, specs and the messages for what does not fit."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dsjax.collectives.shards import axes_of
from dsjax.mesh.build import make_mesh, resolve_sizes, set_platform
from dsjax.mesh.config import AXES, MeshConfig
from dsjax.mesh.layout import RULES, Layout
from dsjax.mesh.report import placement_table, placements

P = PartitionSpec
ZERO = ("fsdp", "expert")


def layout(stage: int, *, data=2, fsdp=2, expert=2, tensor=2) -> Layout:
    mesh = AbstractMesh((data, fsdp, expert, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Layout(mesh, stage)


@settings(deadline=None, max_examples=50)
@given(st.permutations([-1, 1, 2, 3]), st.integers(1, 4))
def test_the_free_axis_takes_the_rest(sizes, rest):
    config = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    resolved = resolve_sizes(config, 6 * rest)
    assert math.prod(resolved.values()) == 6 * rest
    assert all(resolved[axis] == size for axis, size in zip(AXES, sizes, strict=True) if size != -1)


def test_sizes_that_do_not_fit_are_all_named():
    with pytest.raises(ValueError, match=r"data 2 x fsdp 3 x expert 1 x tensor 1 needs 6 devices, but there are 8"):
        resolve_sizes(MeshConfig(data=2, fsdp=3), 8)
    with pytest.raises(ValueError, match=r"the 8 devices are not divisible by 3"):
        resolve_sizes(MeshConfig(data=-1, fsdp=3), 8)


def test_virtual_devices_are_shared_evenly():
    with pytest.raises(ValueError, match=r"mesh.cpu_devices is 8, which 3 processes cannot share evenly"):
        set_platform(MeshConfig(cpu_devices=8), num_processes=3)


@pytest.mark.parametrize("given", ["", "--xla_cpu_enable_concurrency_optimized_scheduler=true"])
def test_virtual_devices_run_their_collectives_in_order(given):
    """In a process of its own: the platform is set before JAX starts. What the user set stays."""
    code = (
        "import os; from dsjax.mesh.build import set_platform; from dsjax.mesh.config import MeshConfig\n"
        "set_platform(MeshConfig(cpu_devices=4))\n"
        "import jax; print(jax.device_count(), os.environ.get('XLA_FLAGS', ''))"
    )
    environment = {**os.environ, "XLA_FLAGS": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"4 {given or '--xla_cpu_enable_concurrency_optimized_scheduler=false'}"


def test_the_last_axis_varies_fastest():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices()[:8])
    assert mesh.axis_names == AXES
    assert [device.id for device in mesh.devices[0, 0, 0]] == [0, 1]
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("axes", "shape", "gathered", "sharded"),
    [
        (("embed", "mlp"), (64, 256), P(None, "tensor"), P(None, ("tensor", *ZERO))),
        (("mlp", "embed"), (256, 64), P("tensor", None), P(("tensor", *ZERO), None)),
        (("embed", "qkv", "heads"), (64, 3, 64), P(None, None, "tensor"), P(None, None, ("tensor", *ZERO))),
        (("vocab", "embed"), (96, 64), P("tensor", None), P(("tensor", *ZERO), None)),
        # The vocabulary divides by tensor alone: ZeRO takes the other dimension.
        (("vocab", "embed"), (98, 64), P("tensor", None), P("tensor", ZERO)),
        (("positions", "embed"), (64, 32), P(None, None), P(ZERO, None)),
        (("embed",), (64,), P(None), P(ZERO)),
        # Nothing divides: whole.
        (("embed",), (6,), P(None), P(None)),
        (("qkv", "heads"), (3, 64), P(None, "tensor"), P(None, ("tensor", *ZERO))),
        # Experts lie on `expert`, so ZeRO has `fsdp` alone, and never cuts the dimension that counts them.
        (("experts", "embed", "mlp"), (4, 64, 96), P("expert", None, "tensor"), P("expert", None, ("tensor", "fsdp"))),
        (("experts", "embed", "mlp"), (8, 64, 6), P("expert", None, "tensor"), P("expert", "fsdp", "tensor")),
        (("experts", "embed"), (64, 3), P("expert", None), P("expert", None)),
        (("embed", "experts"), (64, 4), P(None, "expert"), P("fsdp", "expert")),
    ],
)
def test_specs(axes, shape, gathered, sharded):
    assert layout(3).gathered(axes, shape) == gathered
    assert layout(3).sharded(axes, shape) == sharded


@pytest.mark.parametrize(
    ("stage", "split"),
    [(0, (False, False, False)), (1, (False, False, True)), (2, (False, True, True)), (3, (True, True, True))],
)
def test_zero_stages(stage, split):
    """Parameters, gradients, optimizer state."""
    here = layout(stage)
    specs = (here.parameter, here.gradient, here.optimizer)
    assert tuple(spec(("embed",), (64,)) == P(ZERO) for spec in specs) == split


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(["vocab", "heads", "mlp", "embed", "qkv"]), min_size=1, max_size=3, unique=True),
    st.data(),
)
def test_a_sharded_spec_divides_its_tensor(axes, data):
    """Whatever the shape: dimensions split over tensor stay so, and every split is even."""
    here = layout(3, fsdp=data.draw(st.sampled_from([1, 2, 4])), expert=data.draw(st.sampled_from([1, 3])))
    # Only one dimension of a weight is split over tensor.
    kept = [name for name in axes if here.gathered((name,), (8,)) == P("tensor")][:1]
    axes = tuple(name for name in axes if name in kept or here.gathered((name,), (8,)) == P(None))
    # check_divisible has seen to it that tensor divides.
    shape = tuple(2 * data.draw(st.integers(1, 30)) for _ in axes)
    local = NamedSharding(here.mesh, here.sharded(axes, shape)).shard_shape(shape)
    whole = NamedSharding(here.mesh, here.gathered(axes, shape)).shard_shape(shape)
    shards = here.size(ZERO)
    assert math.prod(whole) in (math.prod(local), shards * math.prod(local))
    if any(size % shards == 0 for size in whole):
        assert math.prod(whole) == shards * math.prod(local)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*RULES]), min_size=1, max_size=4), st.data())
def test_no_spec_has_an_axis_twice(axes, data):
    """Whatever the names, also two that want the same mesh axis: on any mesh, in any stage; activations, too."""
    sizes = {axis: data.draw(st.sampled_from([1, 2, 3, 4]), label=axis) for axis in AXES}
    here = layout(data.draw(st.integers(0, 3), label="stage"), **sizes)
    shape = tuple(12 * data.draw(st.integers(1, 8)) for _ in axes)
    rows = dataclasses.replace(here, batch_axes=("data", *ZERO))  # as in the evaluation program
    split = jax.make_jaxpr(lambda x: rows.activation(x, *axes))(jax.ShapeDtypeStruct((12, *shape), "float32"))
    specs = [kind(tuple(axes), shape) for kind in (here.gathered, here.sharded, here.parameter, here.optimizer)]
    for spec in (*specs, split.jaxpr.eqns[0].params["sharding"].spec):
        used = axes_of(spec)
        assert len(used) == len(set(used)), spec
    # ZeRO splits by all the axes that are left, or not at all, and leaves alone what is split already.
    gathered, sharded = axes_of(specs[0]), axes_of(specs[1])
    free = set(ZERO) - set(gathered)
    assert set(gathered) <= set(sharded) and set(sharded) - set(gathered) in (set(), free)


def test_the_table_of_placements_counts_bytes_of_one_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, P(None, ("tensor", "fsdp")))
    tree = {"a": jax.ShapeDtypeStruct((4, 8), "bfloat16", sharding=sharding)}
    (row,) = placements(tree)
    assert (row.name, row.shape, row.bytes_per_device) == ("a", (4, 8), 4 * 2 * 2)
    assert placement_table(tree).row_count == 2
