"""The compiled one-bit mean: what it sends, counted from its text, and that donated carries are updated in place."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from dsjax.collectives.hlo import count_collectives
from dsjax.collectives.one_bit import Feedback, Scheme, one_bit_mean

SPLIT = jax.P("data")
SIZES = [(1, 4096), (3, 100), (1, 64)]  # [S, n]: a tensor, a stack of three that needs padding, one with a mask


def compiled(num_workers: int, *, checked: bool) -> str | None:
    """The text of a program with state [W, S, N], as optimizers keep it, donated."""

    def mean(tensors, feedback):
        own = jax.tree.map(lambda leaf: leaf[0], (tensors, feedback))
        masks = [None, None, jnp.arange(64)[None] % 3 > 0]
        means, feedback = one_bit_mean(*own, axis="data", num_workers=num_workers, masks=masks)
        return jax.tree.map(lambda leaf: leaf[None], (means, feedback))

    mesh = jax.make_mesh(
        (num_workers,), ("data",), devices=jax.devices()[:num_workers], axis_types=(jax.sharding.AxisType.Auto,)
    )
    shape = lambda x: jax.ShapeDtypeStruct(
        (num_workers, *x.shape), x.dtype, sharding=jax.sharding.NamedSharding(mesh, SPLIT)
    )
    tensors = [jax.ShapeDtypeStruct(size, jnp.float32) for size in SIZES]
    state = jax.tree.map(shape, (tensors, jax.eval_shape(partial(Feedback.zeros, SIZES, num_workers, Scheme()))))
    mapped = jax.shard_map(mean, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=checked)
    return jax.jit(mapped, donate_argnums=(0, 1)).lower(*state).compile().as_text()


@pytest.mark.parametrize(("num_workers", "checked"), [(2, True), (2, False), (4, False)])
def test_bytes_and_copies(num_workers, checked):
    text = compiled(num_workers, checked=checked)
    assert text is not None
    # Of a buffer a worker sends (W-1)/W; of an all-reduce's twice that.
    ways = {"all-to-all": 1, "all-gather": 1, "all-reduce": 2}
    found = count_collectives(text, {"data": num_workers})
    assert len(found) == 2 and {one.dtype for one in found} == {"u8"}
    sent = sum(one.total_bytes * ways[one.kind] * (num_workers - 1) for one in found) / num_workers
    padded = sum(layers * Scheme().padded(size, num_workers) for layers, size in SIZES)
    layers = sum(layers for layers, _ in SIZES)
    assert sent == (num_workers - 1) / num_workers * padded / 4 + 2 * (num_workers - 1) * 4 * layers
    assert not re.findall(r"= f32\S* copy\(.*", text)


@pytest.mark.parametrize(("kernel", "calls"), [("mosaic", 4), ("auto", 0)])
def test_the_mosaic_kernels_are_in_the_program_that_asks_for_them(kernel, calls):
    """Lowered for CUDA on a host without a GPU: two phases for each of two tensors."""
    scheme, sizes = Scheme(kernel=kernel), [(1, 4096), (3, 100)]

    def mean(tensors, feedback):
        own = jax.tree.map(lambda leaf: leaf[0], (tensors, feedback))
        means, feedback = one_bit_mean(*own, axis="data", num_workers=2, scheme=scheme)
        return jax.tree.map(lambda leaf: leaf[None], (means, feedback))

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    wide = lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    tensors = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    state = jax.tree.map(wide, (tensors, jax.eval_shape(partial(Feedback.zeros, sizes, 2, scheme))))
    mapped = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False))
    text = mapped.trace(*state).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu\w*", text)) == calls
