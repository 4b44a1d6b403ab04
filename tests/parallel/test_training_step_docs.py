"""docs/training_step.md: its examples run, one after the other, and their steps are as short as they say."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "training_step.md").read_text()


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_learn(blocks, monkeypatch):
    # Four of the eight virtual devices: the page asks for all there are.
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    names: dict = {}
    setup, *steps = blocks
    exec(setup, names)
    first = float(names["loss"](names["params"], names["batch"]))
    zeros = jax.tree.map(np.zeros_like, names["params"])
    # The third makes 25 updates of four micro-batches.
    for number, (example, updates) in enumerate(zip(steps, (100, 100, 25), strict=True)):
        names["params"] = jax.device_put(zeros, names["params"]["w"].sharding)
        exec(example, names)
        assert names["step"]._cache_size() == 1, number
        value = float(names["loss"](names["params"], names["batch"]))
        assert value < (0.2 if updates == 100 else 0.7) * first, (number, value, first)


def test_a_step_has_at_most_fifteen_lines(blocks):
    for example in blocks[1:]:
        body = example[: example.index("\n\n\nstate = ")].splitlines()
        assert len([line for line in body if line.strip() and not line.startswith("from ")]) <= 15
