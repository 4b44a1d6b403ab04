"""cuDNN's attention under the vmap of the training step, against XLA's. Run on a GPU by make gpu-check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.layers.attention import Visibility, attend, document_mask
from dsjax.layers.positions import alibi_bias

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_fused_attention_under_vmap_agrees_with_float32(packed: bool, alibi: bool, workers: int) -> None:
    shape = (workers, 4, 256, 8, 64)
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
    segments = jnp.sort(jax.random.randint(jax.random.key(3), shape[1:3], 1, 4), axis=1)
    places = jnp.arange(shape[2])
    visibility = Visibility(
        document_mask(segments, segments, places, places) if packed else None,
        alibi_bias(shape[3], places[None], places[None]) if alibi else None,
    )

    def total(q, k, v):
        return jax.vmap(lambda q, k, v: attend(q, k, v, visibility))(q, k, v).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    assert "cudnn" in gradient.lower(*half).compile().as_text()
    for got, want in zip(gradient(*half), gradient(q, k, v), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want)
        # bfloat16 operands: 8 bits, so errors of a few parts in a thousand of the tensor's norm.
        assert np.linalg.norm(got - want) < 2e-2 * np.linalg.norm(want)
