"""What is said of difficulties, and `dsjax analyze`, which says it."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.cli import analyze
from dsjax.cli.main import VERBS, main
from dsjax.data.config import DifficultyConfig, FixedLinear
from dsjax.data.curriculum.describe import PERCENTILES, histogram, percentiles, printable
from dsjax.data.curriculum.draw import Curriculum

values_of = st.lists(st.integers(0, 2**60), min_size=1, max_size=200).map(lambda some: np.array(some, np.int64))


@settings(deadline=None, max_examples=100)
@given(values_of | st.lists(st.integers(0, 40), min_size=1, max_size=200).map(np.array))
def test_every_row_is_in_one_line_of_the_histogram(values):
    lines = histogram(values)
    assert 1 <= len(lines) <= 16 and max(map(len, lines)) <= 100
    before, total = int(values.min()) - 1, 0
    for line in lines:
        begin, _, end, count = (part.replace(",", "") for part in line.split()[:4])
        assert int(begin) == before + 1 and ("#" in line) == (int(count) > 0)
        assert int(count) == sum(int(begin) <= value <= int(end) for value in values.tolist())
        before, total = int(end), total + int(count)
    assert before == values.max() and total == len(values)


@settings(deadline=None, max_examples=50)
@given(values_of)
def test_percentiles_are_what_a_curriculum_draws(values):
    found = percentiles(values)
    assert found[0] == values.min() and found[100] == values.max() and tuple(found) == PERCENTILES
    for percent in (25, 50, 90):
        if len(values) * percent // 100:
            growth = DifficultyConfig(metric="a", min=percent, max=percent, schedule=FixedLinear(steps=1, quantum=1))
            drawn = Curriculum({"a": values}, [growth], batch_size=1).rows(np.arange(len(values) * percent // 100))
            assert values[drawn].max() == found[percent]


@given(st.text())
def test_nothing_that_a_terminal_obeys(text):
    assert printable(text).isprintable()
    assert text.isprintable() <= (printable(text) == text)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("\x1b[2J" + "e" * number + "zq"[number % 2] * 5)
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: {steps: 1}\n"
        "data:\n"
        f"  sources: [{{kind: text, path: '{tmp_path}/text'}}]\n"
        "  tokenizer: {kind: byte}\n"
        "  sequence_length: 32\n"
        "  pack: none\n"
        "  validation_fraction: 0\n"
        f"  cache_dir: '{tmp_path}/cache'\n"
    )
    return path


def test_the_command(config, capsys, tmp_path):
    import matplotlib.image

    curriculum = "curriculum={difficulty: [{metric: length, schedule: {kind: fixed_linear, steps: 9}, min: 8}]}"
    assert main(["analyze", str(config), "--set", curriculum, "--examples", "1"]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines()[:-1])) <= 100 and "\x1b" not in out and "measuring length" in err
    assert "easiest: row " in out and "\\x1b[2J" in out and "hardest: row " in out
    assert main(["analyze", str(config), "--set", curriculum, "--metric", "vocab_rarity", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["vocab_rarity"]
    assert err == "" and found["rows"] == sum(-(-(number + 9) // 32) for number in range(40))
    assert found["easiest"][0][1] == found["percentiles"]["0"] <= found["hardest"][0][1] == found["percentiles"]["100"]
    assert matplotlib.image.imread(f"{found['folder']}/histogram.png").shape == (600, 1200, 4)
    values = np.load(f"{found['folder']}/values.npy")
    assert len(values) == found["rows"] and values[found["hardest"][0][0]] == values.max()
    # What lies beside the values does not make the index another one.
    assert main(["analyze", str(config), "--metric", "vocab_rarity", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_rarity"] == found


def test_mistakes_are_one_message(config, capsys):
    for arguments, message in [
        ([], "has no curriculum.difficulty: name a metric, such as --metric vocab_rarity"),
        (["--metric", "rarity"], "no metric 'rarity'; there are vocab_rarity, length"),
        (["--metric", "length", "--examples", "-1"], "--examples must be 0 or more"),
        (["--metric", "length", "--workers", "0"], "--workers 1 or more; got 2, 0"),
    ]:
        assert main(["analyze", str(config), *arguments]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("tokenising")]
        assert out == "" and len(lines) == 1 and message in lines[0] and "Traceback" not in err


def test_a_metric_that_is_not_there_shows_before_any_work(config, capsys, tmp_path):
    both = "[{metric: length, schedule: S, min: 8}, {metric: rarity, schedule: S, min: 8}]"
    both = both.replace("S", "{kind: fixed_linear, steps: 9}")
    for verb, more in (
        ("analyze", []),
        ("train", ["--run-dir", str(tmp_path / "run"), "--set", f"data.cache_dir={tmp_path}/c"]),
    ):
        assert main([verb, str(config), "--set", f"curriculum={{difficulty: {both}}}", *more]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("dsjax: error: no metric 'rarity'") and out == ""
    assert not (tmp_path / "run").exists() and not (tmp_path / "c").exists() and not (tmp_path / "cache").exists()


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(config, capsys):
    command = ["analyze", str(config), "--metric", "length", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    picture = Path(found["length"]["folder"], "histogram.png")
    picture.unlink()
    picture.mkdir()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == found and f"warning: {picture} cannot be written: Is a directory" in err


def test_no_examples(config, capsys):
    parser = argparse.ArgumentParser()
    analyze.add_arguments(parser)
    assert analyze.run(parser.parse_args([str(config), "--metric", "length", "--examples", "0"])) == 0
    assert ": row" not in capsys.readouterr().out and VERBS["analyze"] == analyze.HELP
