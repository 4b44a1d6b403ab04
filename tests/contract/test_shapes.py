"""The tests check annotations of arrays (tests/shapes.py), of everything of ours, and nobody else does."""

import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array, Float

from dsjax.layers.context import Context
from dsjax.layers.norm import Norm
from tests import shapes

ROOT = Path(__file__).parents[2]


def matmul(x: Float[Array, "n k"], y: Float[Array, "k m"], *, scale: float = 1.0) -> Float[Array, "n m"]:
    return scale * x @ y


@pytest.mark.parametrize(
    ("x", "y"),
    [((2, 3), (2, 3)), ((2,), (2, 3))],
    ids=["sizes", "dimensions"],
)
def test_wrong_shapes_are_errors(x, y):
    checked = jaxtyping.jaxtyped(matmul, typechecker=shapes.checked)
    assert checked(jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="matmul"):
        checked(jnp.ones(x), jnp.ones(y))


def test_other_annotations_are_left_to_the_type_checker():
    checked = jaxtyping.jaxtyped(matmul, typechecker=shapes.checked)
    assert checked(jnp.ones((2, 3)), jnp.ones((3, 4)), scale=jnp.float32(2)).shape == (2, 4)


def test_traced_values_are_checked_and_the_result_too():
    def wrong(x: Float[Array, "n"]) -> Float[Array, "n n"]:
        return x

    checked = jaxtyping.jaxtyped(wrong, typechecker=shapes.checked)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        jax.eval_shape(checked, jnp.ones(3))


def test_our_modules_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="Norm"):
        Norm(4, "rms", eps=1e-5)(jnp.ones((2, 3, 4), jnp.int32), Context())
    assert "jaxtyping" in vars(inspect.getmodule(Norm))


def test_nothing_is_checked_outside_of_the_tests():
    code = "import sys, dsjax.layers.norm; sys.exit('beartype' in sys.modules or 'typeguard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
