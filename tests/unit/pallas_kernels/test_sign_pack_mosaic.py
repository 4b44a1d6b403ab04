"""The Mosaic kernels without a GPU: interpreted with race detection against the XLA path, and lowered for CUDA.

Interpreting runs the kernel's program, but knows nothing of registers: what the layouts do on a GPU is tested in
tests/gpu. Lowering for CUDA checks that the layouts fit together, down to the module that the GPU's compiler gets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.sign_pack import reference, shapes

pack = functools.partial(pallas_kernels.sign_pack, implementation="mosaic")
average = functools.partial(pallas_kernels.unpack_average, implementation="mosaic")


@pytest.fixture
def interpreted():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def arrays(shape: tuple[int, int], dtype: str = "float32"):
    rng = np.random.default_rng(shape[1])
    x, carry = rng.standard_normal((2, *shape)).astype(np.float32)
    scale = np.abs(rng.standard_normal(shape[0])).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(carry), jnp.asarray(scale)


def check(got, want) -> None:
    """The same to the bit, but for the order in which squares are added."""
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=1e-6)


# One tile; a block of 8 tiles and another with one; three tensors of three tiles.
@pytest.mark.parametrize(
    ("shape", "dtype", "masked", "length"),
    [
        ((1, 512), "bfloat16", False, None),
        ((1, 4608), "float32", False, None),
        ((3, 1536), "float32", True, 1001),
    ],
)
def test_sign_pack_interpreted(interpreted, shape, dtype, masked, length):
    x, carry, scale = arrays(shape, dtype)
    mask = jnp.asarray(np.random.default_rng(1).random(shape) < 0.7) if masked else None
    traced = None if length is None else jnp.int32(length)
    got = jax.jit(pack)(x, carry, scale, mask=mask, length=traced)
    check(got, reference.feed_back(x, carry, scale, mask=mask, length=length))


@pytest.mark.parametrize("num_workers", [2, 9])  # unrolled, and in a loop
def test_unpack_average_interpreted(interpreted, num_workers):
    _, carry, scale = arrays((2, 512))
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (num_workers, 2, 64), np.uint8)
    scales = jnp.asarray(np.abs(rng.standard_normal((num_workers, 2))), jnp.float32)
    got = jax.jit(average)(bits, scales, carry, scale, length=500)
    x = reference.average(jnp.asarray(bits), scales)
    np.testing.assert_allclose(got[0], reference.feed_back(x, carry, scale, mask=None, length=500)[0], atol=2e-6)
    # Signs and squares of the carry that the kernel has.
    np.testing.assert_array_equal(got[1], np.packbits(np.asarray(got[0]) >= 0, axis=1))
    np.testing.assert_allclose(got[2], (np.asarray(got[0], np.float64) ** 2).sum(axis=1), rtol=1e-6)


def for_cuda(function, *arguments, **keywords) -> str:
    donated = jax.jit(function, donate_argnames="carry")
    return donated.trace(*arguments, **keywords).lower(lowering_platforms=("cuda",)).as_text()


def spec(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_sign_pack_lowers_for_cuda(dtype, masked):
    shape = (24, 2**20)
    keywords = {"mask": spec(shape, "int8"), "length": spec((), "int32")} if masked else {}
    text = for_cuda(pack, spec(shape, dtype), spec(shape), spec(shape[:1]), **keywords)
    assert text.count("@mosaic_gpu_v2") == 1 and "sign_pack" in text
    assert "output_operand_alias" in text  # the carry stays where it is
    # One pass: nothing else touches an array of this size.
    others = [
        line for line in text.splitlines() if "stablehlo." in line and "x2048x" in line.replace("131072x8", "x2048x")
    ]
    assert all("stablehlo.reshape" in line or "@mosaic_gpu_v2" in line for line in others) and others


@pytest.mark.parametrize("num_workers", [2, 64])
def test_unpack_average_lowers_for_cuda(num_workers):
    shape = (24, 2**14)
    bits, scales = spec((num_workers, 24, 2**11), "uint8"), spec((num_workers, 24))
    text = for_cuda(average, bits, scales, spec(shape), spec((24,)))
    assert text.count("@mosaic_gpu_v2") == 1 and "output_operand_alias" in text


def test_lowers_for_cuda_inside_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharded = functools.partial(jax.shard_map, pack, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    place = NamedSharding(mesh, P("data"))
    arguments = [jax.ShapeDtypeStruct(s, "float32", sharding=place) for s in ((4, 1024), (4, 1024), (4,))]

    def phase(x, carry, scale, check_vma=False):
        return sharded(check_vma=check_vma)(x, carry, scale)

    assert "@mosaic_gpu_v2" in for_cuda(phase, *arguments)
    with pytest.raises(ValueError, match=r"in place: use jax.shard_map\(check_vma=False\)"):
        for_cuda(functools.partial(phase, check_vma=True), *arguments)


@pytest.mark.parametrize("size", [512, 1024, 1536, 4096, 2**20 + 512, 2**24])
def test_tiles_cover_a_tensor_once(size):
    tile = shapes.tiling((1, size))
    assert tile.rows in (64, 128, 256) and size % (8 * tile.rows) == 0
    assert (
        (tile.blocks(size) - 1) * tile.per_block * tile.rows * 8
        < size
        <= tile.blocks(size) * tile.per_block * tile.rows * 8
    )


def test_too_many_tensors():
    with pytest.raises(ValueError, match="at most 65535 tensors in a call, not 65536"):
        for_cuda(pack, spec((65536, 512)), spec((65536, 512)), spec((65536,)))
