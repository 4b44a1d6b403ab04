"""Eight virtual CPU devices and a compilation cache for every test, set before JAX's backend starts."""

import os
from pathlib import Path

import jax
import models_on_disk
import pytest

from dsjax.mesh.build import order_cpu_collectives

CACHE = Path(__file__).parent.parent / ".cache" / "jax-tests"

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
