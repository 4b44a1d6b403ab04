"""What the end-to-end tests share: the data, one uninterrupted run, and a quick way to start others."""

import os
import sys
from pathlib import Path

import pytest
from e2e_runs import Zygote, once, train, write_config, write_texts


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all of pytest's processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def texts(shared) -> Path:
    return once(shared, "texts", write_texts)


@pytest.fixture(scope="session")
def config(shared, texts) -> Path:
    """The config file of the tiny run."""
    return once(shared, "tiny.yaml", lambda path: write_config(path, texts))


@pytest.fixture(scope="session")
def reference(shared, config) -> Path:
    """The folder of the tiny run, not interrupted, by the real command. Not to be changed: copy it."""
    return once(shared, "reference", lambda folder: train(config, "--run-dir", folder))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("looks at processes through /proc")
    zygote = Zygote(tmp_path_factory.mktemp("lives"))
    yield zygote
    zygote.close()
