"""Difficulties of rows against counting by hand; their index: kept, resumed after a kill, refused if it is wrong."""

import collections
import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dsjax.data.config import (
    ByteTokenizer,
    CurriculumConfig,
    CustomSchedule,
    DataConfig,
    DifficultyConfig,
    JsonlSource,
)
from dsjax.data.corpus.build import build_corpus
from dsjax.data.corpus.store import TokenStore
from dsjax.data.curriculum import analyze
from dsjax.data.curriculum.analyze import metrics_of, open_index
from dsjax.data.curriculum.metrics import metric_of, surprisals
from dsjax.data.rows.masked import MaskedFormat, Masker
from dsjax.data.rows.mixture import Rows

ROOT = Path(__file__).parents[4]
LENGTH = 16


def first_token(tokens, mask):
    return tokens[:, 0]


def as_floats(tokens, mask):
    return np.where(np.arange(len(tokens)) == 1, np.nan, 1.5)


def as_half(tokens, mask):
    return tokens.mean(axis=1)


def as_list(tokens, mask):
    return [1] * len(tokens)


def as_table(tokens, mask):
    return tokens


def below_zero(tokens, mask):
    return np.where(np.arange(len(tokens)) == 2, -7, tokens[:, 0])


def documents(count, seed=0):
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("eeeeetttaaqz "), random.integers(1, 50))) for _ in range(count)]


def config_of(folder, texts, **changes):
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = JsonlSource(path=str(path))
    options = {"tokenizer": ByteTokenizer(), "validation_fraction": 0.0, "sequence_length": LENGTH}
    return DataConfig(sources=(source,), cache_dir=str(folder / "cache"), **options | changes)


def index_of(config, *metrics, **options):
    corpus = build_corpus(config)
    rows = Rows.of(corpus, config, split="train")
    return open_index(corpus, rows, config=config, metrics=metrics or ("vocab_rarity",), **options)


@pytest.mark.parametrize("pack", ["none", "best_fit", "stream"])
@pytest.mark.parametrize("isolate", [True, False])
def test_metrics_are_what_counting_gives(tmp_path, pack, isolate):
    config = config_of(tmp_path, documents(60), pack=pack, isolate_documents=isolate)
    corpus = build_corpus(config)
    rows = Rows.of(corpus, config, split="train")
    names = ("vocab_rarity", "length", "length_then_rarity")
    values = open_index(corpus, rows, config=config, metrics=names).values
    counts = collections.Counter(corpus.train[0].tokens.tolist())
    total = sum(counts.get(token, 1) for token in range(257))
    nats = {token: -math.log(counts.get(token, 1) / total) for token in range(257)}
    each = 10 ** (math.ceil(math.log10(LENGTH * max(nats.values()))) + 1)
    for row in range(rows.num_rows):
        batch = rows.read(np.array([0]), np.array([row]))
        tokens = batch["tokens"][0].tolist()
        while tokens and tokens[-1] == 0:  # no text here holds the byte 0: it is padding
            tokens.pop()
        exact = math.fsum(nats[token] for token in tokens)
        assert abs(values["vocab_rarity"][row] + 0.5 - exact) <= 0.5 + 1e-9
        assert values["length"][row] == len(tokens)
        assert values["length_then_rarity"][row] == len(tokens) * each + values["vocab_rarity"][row]
    assert values["vocab_rarity"].max() < each / 10
    assert all(value.dtype == np.int64 for value in values.values())


def test_hidden_tokens_are_measured_as_they_were(tmp_path):
    store = TokenStore(tokens=np.array([5, 6, 6, 7, 7, 7, 8, 9]), offsets=np.array([0, 4, 8]), hash="x")
    masker = Masker(mask_token=1, ordinary=np.arange(10) > 1, share=0.9, seed=0)
    rows = Rows([store], MaskedFormat(sequence_length=5, pack="none", masker=masker))
    tokens, mask = rows.plain(np.arange(2))
    assert tokens.tolist() == [[5, 6, 6, 7, 0], [7, 7, 8, 9, 0]]
    rarity = metric_of("vocab_rarity", [store], vocab_size=10, sequence_length=5)(tokens, mask)
    nats = surprisals([store], 10)
    assert rarity.tolist() == [int(nats[[5, 6, 6, 7]].sum()), int(nats[[7, 7, 8, 9]].sum())]


def test_a_function_of_ones_own_over_two_sources(tmp_path):
    config = config_of(tmp_path, documents(30), pack="none")
    (tmp_path / "b").mkdir()
    other = config_of(tmp_path / "b", documents(20, seed=1)).sources
    both = DataConfig(
        sources=config.sources + other, tokenizer=ByteTokenizer(), validation_fraction=0.0, sequence_length=LENGTH,
        pack="none", cache_dir=config.cache_dir,
    )  # fmt: skip
    values = index_of(both, f"{__name__}.first_token").values[f"{__name__}.first_token"]
    rows = Rows.of(build_corpus(both), both, split="train")
    alone = [Rows.of(build_corpus(c), c, split="train") for c in (config, DataConfig(**_fields(both, sources=other)))]
    expected = [r.read(np.zeros(r.num_rows, int), np.arange(r.num_rows))["tokens"][:, 0] for r in alone]
    assert values.tolist() == np.concatenate(expected).tolist() and len(values) == rows.num_rows


def _fields(config, **changes):
    return {name: getattr(config, name) for name in config.__dataclass_fields__} | changes


def test_it_is_measured_once_by_one_of_several(tmp_path, monkeypatch):
    config = config_of(tmp_path, documents(60))
    corpus = build_corpus(config)
    rows = Rows.of(corpus, config, split="train")
    measured, found = [], []
    measure = analyze._measure
    monkeypatch.setattr(analyze, "_measure", lambda *a: (measured.append(1), measure(*a)))

    def want():
        found.append(open_index(corpus, rows, config=config, metrics=["length"]))

    rivals = [threading.Thread(target=want) for _ in range(4)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    want()
    assert len(measured) == 1 and len(found) == 5
    assert len({index.values["length"].tobytes() for index in found}) == 1
    assert [path.name for path in (tmp_path / "cache/difficulty").iterdir()] == [found[0].folders["length"].name]


KILLED = """
import os, signal, sys
from dsjax.data.curriculum import analyze
from dsjax.data.corpus.build import build_corpus
from dsjax.data.config import ByteTokenizer, DataConfig, JsonlSource
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.packed import PackedFormat
analyze._BLOCK_POSITIONS = 64
save, saved = analyze.np.save, []
def save_some(file, values):
    if len(saved) == 3:
        file.write(b"half of a block"), file.flush(), os.kill(os.getpid(), signal.SIGKILL)
    saved.append(save(file, values))
analyze.np.save = save_some
path, cache = sys.argv[1:]
config = DataConfig(sources=(JsonlSource(path=path),), tokenizer=ByteTokenizer(), validation_fraction=0.0,
                    sequence_length=16, cache_dir=cache)
corpus = build_corpus(config)
rows = Rows([corpus.train[0]], PackedFormat(sequence_length=16))  # keeps no index of its own
analyze.open_index(corpus, rows, config=config, metrics=["vocab_rarity"], workers=1)
"""


def test_a_killed_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    config = config_of(tmp_path, documents(60))
    command = [sys.executable, "-c", KILLED, config.sources[0].path, config.cache_dir]
    assert subprocess.run(command, timeout=60, cwd=ROOT).returncode == -9
    (partial,) = (tmp_path / "cache/difficulty").iterdir()
    names = sorted(path.name for path in partial.iterdir())
    assert names == ["lock", *(f"rows-{4 * n:012d}.npy" for n in range(3)), "rows-000000000012.tmp"]
    (partial / "rows-000000000004.npy").write_bytes(b"copied badly")
    monkeypatch.setattr(analyze, "_BLOCK_POSITIONS", 64)
    begun, write = [], analyze._write_block
    monkeypatch.setattr(analyze, "_write_block", lambda *a: (begun.append(a[3]), write(*a)))
    resumed = index_of(config).values["vocab_rarity"]
    assert sorted(begun) == [4, *range(12, len(resumed), 4)] and len(resumed) > 40
    assert not partial.exists()
    shutil.rmtree(tmp_path / "cache/difficulty")
    monkeypatch.undo()
    assert np.array_equal(index_of(config).values["vocab_rarity"], resumed)


def test_an_index_of_other_data_and_a_damaged_one_are_refused(tmp_path):
    config = config_of(tmp_path, documents(60))
    (folder,) = index_of(config).folders.values()
    (other,) = index_of(config_of(tmp_path, documents(60), isolate_documents=False)).folders.values()
    assert folder != other and folder.parent == other.parent
    values = np.load(folder / "values.npy")
    shutil.rmtree(other)
    shutil.copytree(folder, other)
    with pytest.raises(
        ValueError, match=r"is an index of other data, settings or code: remove it, it will be built ag"
    ):
        index_of(config_of(tmp_path, documents(60), isolate_documents=False))
    shutil.rmtree(other)
    whole = (folder / "values.npy").read_bytes()
    for damaged in (whole[:-8], whole[:-1] + b"\x01", b"", b"\x80\x04pickle"):
        (folder / "values.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"the index {folder} is damaged: remove it"):
            index_of(config)
    (folder / "values.npy").write_bytes(whole)
    assert np.array_equal(index_of(config).values["vocab_rarity"], values)
    for manifest in ("{", "[]", "{}"):
        (folder / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match="is damaged: remove it"):
            index_of(config)


def test_what_decides_the_values_decides_the_folder(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text("def f(tokens, mask):\n    return mask.sum(axis=1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    metric, texts = "my_metric.f", documents(60)
    base = config_of(tmp_path, texts)
    folders = []
    for config, name in [
        (base, metric),
        (base, "length"),
        (config_of(tmp_path, texts, pack="stream"), metric),
        (config_of(tmp_path, texts, sequence_length=8), metric),
        (config_of(tmp_path, texts, validation_fraction=0.3), metric),
    ]:
        folders.append(index_of(config, name).folders[name])
    (tmp_path / "my_metric.py").write_text("def f(tokens, mask):\n    return mask.sum(axis=1) + 1\n")
    folders.append(index_of(base, metric).folders[metric])
    assert len(set(folders)) == len(folders)
    same = [config_of(tmp_path, texts, shuffle_seed=5, read_threads=4), config_of(tmp_path, texts, mask_share=0.5)]
    assert {index_of(config, "length").folders["length"] for config in same} == {folders[1]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "as_floats",
            r"row 1 of \d+: .*as_floats gave float64, such as nan; a metric gives one whole number from 0 on",
        ),
        ("as_half", r"row 0 of \d+: .*gave float64, such as \d.*: scale and round it, .astype\(numpy.int64\)"),
        ("as_list", r"rows 0 to \d+ of \d+: .*as_list gave a list for \d+ rows; .*: use numpy.asarray\(...\)"),
        ("as_table", r"rows 0 to \d+ of \d+: .*gave an array of shape \[\d+, 16\] for \d+ rows"),
        ("below_zero", r"row 2 of \d+: .*below_zero gave -7; .*: add what makes the least of them 0"),
        ("nowhere", r"names no function: '.*' has no 'nowhere'"),
    ],
)
def test_a_function_that_gives_no_difficulty(tmp_path, function, message):
    with pytest.raises(ValueError, match=message):
        index_of(config_of(tmp_path, documents(60)), f"{__name__}.{function}")


def test_metrics_that_there_are_not(tmp_path):
    config = config_of(tmp_path, documents(60))
    with pytest.raises(
        ValueError, match="no metric 'rarity'; there are vocab_rarity, length, length_then_rarity, or the"
    ):
        index_of(config, "rarity")
    with pytest.raises(ValueError, match=r"cannot import 'no_such_module' of 'no_such_module\.f'"):
        index_of(config, "no_such_module.f")
    assert not (tmp_path / "cache/difficulty").exists()


def test_which_metrics_a_curriculum_needs():
    growth = CustomSchedule(function="a.b")
    difficulty = tuple(DifficultyConfig(metric=metric, schedule=growth) for metric in ("length", "vocab_rarity"))
    assert metrics_of(CurriculumConfig(difficulty=difficulty, cut_to_longest=True)) == ("length", "vocab_rarity")
