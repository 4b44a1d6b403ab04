"""Eight virtual CPU devices and a compilation cache for every test, set before JAX's backend starts.

Compiling takes most of the time of most tests, and what they are about is decided before XLA makes machine code: that
is not optimised, but for golden/, whose figures are recorded ones, for gpu/, and where DSJAX_TEST_OPTIMIZED=1 asks for
it.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import models_on_disk
import pytest

from tests import shapes

shapes.check_shapes()

from dsjax.mesh.build import order_cpu_collectives  # noqa: E402  after the hook
from tests import helpers  # noqa: E402

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache" / "jax-tests"
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 20_000
OPTIMIZED = [HERE / "golden", HERE / "gpu"]
# The numeric core, in which no array changes its dtype for the sake of another unless it is asked to.
STRICT_DTYPES = [HERE / "unit" / room for room in ("layers", "models", "optimizers", "collectives", "setup")]

pytest_plugins = ["time_per_folder"]
collect_ignore = ["golden/record"]  # scripts that need torch
if os.environ.get("DSJAX_TEST_PLATFORM", "cpu") == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    order_cpu_collectives()
    collect_ignore.append("gpu")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_collection_modifyitems(items):
    for marker in models_on_disk.MARKERS:
        if models_on_disk.find(marker) is None:
            skip = pytest.mark.skip(reason=models_on_disk.reason(marker))
            for item in items:
                if marker in item.keywords:
                    item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    lies_in = lambda folders: any(item.path.is_relative_to(folder) for folder in folders)
    optimized = os.environ.get("DSJAX_TEST_OPTIMIZED") == "1" or lies_in(OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    try:
        with jax.numpy_dtype_promotion("strict" if lies_in(STRICT_DTYPES) else "standard"):
            return (yield)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For what others wrote, optax say, where STRICT_DTYPES would be strict."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Machine code lies in memory mappings, of which Linux allows a process 65,530: XLA crashes at the next."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        helpers.make_training.cache_clear()
        jax.clear_caches()
        gc.collect()
