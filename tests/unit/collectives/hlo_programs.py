"""Tiny programs with one known collective each, on a mesh data 2 x fsdp 2 x expert 1 x tensor 2.

Run as a script it compiles them on CPU and writes what XLA prints to fixtures/cpu_*.txt.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

AXIS_SIZES = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
AXES = tuple(AXIS_SIZES)
FIXTURES = Path(__file__).parent / "fixtures"


def _nested_scan(a):
    inner = lambda c, _: (lax.psum(jnp.sin(c), "tensor"), None)
    return lax.scan(lambda c, _: (lax.scan(inner, c, None, length=3)[0], None), a, None, length=4)[0]


def _cond(a):
    wide = lambda c: lax.psum(jnp.concatenate([c, c], 1), "fsdp")[:, :16]
    return lax.cond(lax.psum(a.sum(), AXES) > 0, lambda c: lax.psum(c, "data"), wide, a)


def _while(a):
    return lax.while_loop(lambda c: c.sum() < 100.0, lambda c: lax.psum(jnp.sin(c) + 1, "data"), a)


def _quiet_while(a):
    return lax.psum(lax.while_loop(lambda c: c.sum() < 100.0, lambda c: jnp.sin(c) + 1, a), "data")


# name -> (function of a device's shard f32[1,16], 64 bytes; collectives (kind, axes, bytes, count) worked out by hand,
# None where the number of executions cannot be known)
PROGRAMS: dict[str, tuple[Callable, list[tuple[str, tuple[str, ...], int, int]] | None]] = {
    "psum": (lambda a: lax.psum(a, "data"), [("all-reduce", ("data",), 64, 1)]),
    "psum_two_axes": (lambda a: lax.psum(a, ("data", "tensor")), [("all-reduce", ("data", "tensor"), 64, 1)]),
    "psum_all": (lambda a: lax.psum(a, AXES), [("all-reduce", ("data", "fsdp", "tensor"), 64, 1)]),
    "psum_of_one": (lambda a: lax.psum(a, "expert"), []),
    "all_gather": (lambda a: lax.all_gather(a, "tensor"), [("all-gather", ("tensor",), 128, 1)]),
    # 16 signs in 2 bytes, from 2 devices
    "all_gather_bits": (
        lambda a: lax.all_gather(jnp.packbits(a > 0, axis=1), "fsdp"),
        [("all-gather", ("fsdp",), 4, 1)],
    ),
    "psum_scatter": (
        lambda a: lax.psum_scatter(a, "fsdp", scatter_dimension=1, tiled=True),
        [("reduce-scatter", ("fsdp",), 64, 1)],
    ),
    "all_to_all": (lambda a: lax.all_to_all(a, "data", 1, 0, tiled=True), [("all-to-all", ("data",), 64, 1)]),
    "ppermute": (
        lambda a: lax.ppermute(a, "tensor", [(0, 1), (1, 0)]),
        [("collective-permute", ("tensor",), 64, 1)],
    ),
    "scan": (
        lambda a: lax.scan(lambda c, _: (lax.psum(jnp.sin(c), "data"), None), a, None, length=5)[0],
        [("all-reduce", ("data",), 64, 5)],
    ),
    "nested_scan": (_nested_scan, [("all-reduce", ("tensor",), 64, 12)]),
    "while": (_while, None),
    "quiet_while": (_quiet_while, [("all-reduce", ("data",), 64, 1)]),
    # the branch over fsdp holds twice the bytes of the one over data
    "cond": (_cond, [("all-reduce", ("data", "fsdp", "tensor"), 4, 1), ("all-reduce", ("fsdp",), 128, 1)]),
}


def compiled_text(function: Callable) -> str:
    """What XLA prints of `function` over the 8 devices, each with a row of f32[8,16]."""
    mesh = jax.make_mesh(tuple(AXIS_SIZES.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    text = jax.jit(mapped).lower(jnp.zeros((8, 16), jnp.float32)).compile().as_text()
    assert text is not None
    return text


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for name, (function, _) in PROGRAMS.items():
        without_folders = re.sub(r'"/[^"]*/', '"', compiled_text(function))
        (FIXTURES / f"cpu_{name}.txt").write_text(without_folders.rstrip() + "\n")
