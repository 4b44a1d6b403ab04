"""docs/data_efficiency.md: its settings are read as they stand, its examples run and print what they say."""

import contextlib
import io
import re
from pathlib import Path

import yaml

from dsjax.config.load import from_dict
from dsjax.config.run import RunConfig
from dsjax.data.config import FixedRoot

PAGE = (Path(__file__).parents[2] / "docs" / "data_efficiency.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_settings():
    (settings,) = blocks("yaml")
    config = from_dict(RunConfig, {"train": {"steps": 10}, **yaml.safe_load(settings)})
    assert config.curriculum is not None and config.random_ltd is not None
    assert config.curriculum.difficulty[0].schedule == FixedRoot(steps=5000)


def test_the_examples():
    printed = []
    for example in blocks("python"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(example, "docs/data_efficiency.md", "exec"), {})
        printed.append(out.getvalue().split())
    (first, last), (unchanged,) = ([int(number) for number in numbers] for numbers in printed)
    assert first <= 65 and 150 < last <= 200 and unchanged == 4 * (128 - 48)
