"""For a machine with a GPU that has little more than JAX: pytest --confcutdir=tests/gpu leaves tests/conftest.py out,
which imports what is not there (dsjax.data, and so grain and tokenizers).
"""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Collecting starts no backend; running without a GPU ends at once, rather than test a CPU."""
    if jax.default_backend() != "gpu":
        pytest.exit(f"tests/gpu are for a GPU, but JAX has {jax.devices()[0].device_kind} only", returncode=1)
