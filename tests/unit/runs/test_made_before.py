"""What was made before the tokens that frame a text counted goes on with its ids, and is not mixed with new ones.

tests/golden/made_before is what commit 4dad114 left behind: see tests/golden/record/record_made_before.py.
"""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dsjax.data.config import (
    BPETokenizer,
    ByteTokenizer,
    DataConfig,
    DataTask,
    FileTokenizer,
    JsonlSource,
    TextSource,
    TokenizerConfig,
    TokensSource,
)
from dsjax.data.corpus.build import build_corpus
from dsjax.inference.open import open_model
from dsjax.inference.text import plain_prompt
from dsjax.runs.folder import read_config
from dsjax.train.loop import run

GOLDEN = Path(__file__).parents[2] / "golden"
DATA = DataConfig(
    sources=(TextSource(path="text"),),
    tokenizer=FileTokenizer(path="model"),
    sequence_length=8,
    validation_fraction=0,
    cache_dir="cache",
)
OLD_DOCUMENTS = [[9, 7, 10, 7, 10, 8, 2], [5, 9, 7, 5, 9, 7, 4, 3, 8, 2]]  # without <s>, which is 1
SAID = "begun without the <s> that their tokenizer puts around a text"


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The recorded folder, copied; the hash of its run's data."""
    shutil.copytree(GOLDEN / "made_before", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return json.loads(Path("run/data.json").read_text())["hash"]


def documents(corpus):
    return [store.document(number).tolist() for store in corpus.train for number in range(store.num_documents)]


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_new_data_have_the_frame_and_lie_beside_the_old(begun):
    before = files_of("cache")
    (old,) = Path("cache/corpora").iterdir()
    assert np.fromfile(old / "train-0.tokens", "<u2").tolist() == [
        token for document in OLD_DOCUMENTS for token in document
    ]
    corpus = build_corpus(DATA)
    assert documents(corpus) == [[1, *document] for document in OLD_DOCUMENTS] and not corpus.note
    assert corpus.hash != begun and corpus.folder != old
    assert {path: before[path] for path in before} == {path: path.read_bytes() for path in before}
    assert documents(build_corpus(DATA)) == documents(corpus)
    assert build_corpus(DATA, begun=corpus.hash).hash == corpus.hash


@pytest.mark.parametrize("cache", ["kept", "lost"])
def test_a_run_goes_on_with_the_ids_that_it_was_made_with(begun, cache):
    if cache == "lost":
        shutil.rmtree("cache")
    corpus = build_corpus(DATA, begun=begun)
    assert documents(corpus) == OLD_DOCUMENTS and corpus.hash == begun and SAID in corpus.note
    Path("text/a.txt").write_text("ab\n")
    changed = build_corpus(DATA, begun=begun)
    assert changed.hash != begun and documents(changed)[0] == [1, *changed.tokenizer.encode("ab\n"), 2]


def test_the_real_run_goes_on(begun):
    losses = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    said = io.StringIO()
    config = read_config(Path("run"))
    # The run was started from Python with a whole number, which its key keeps apart from the 0.0 of a file.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0))
    result = run(config, run_dir="run", resume="must", console=Console(file=said, width=200))
    again = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    # Equal but for the order of sums on eight devices.
    np.testing.assert_allclose(again, losses, rtol=2e-6)
    assert result.summary["data_hash"]["value"] == begun and said.getvalue().count(SAID) == 1
    reports = []
    trained = open_model("run", report=reports.append)
    assert plain_prompt(trained, "ab").ids == [9] and trained.tokenizer.begin == []
    assert len(reports) == 1 and "run was trained without the <s>" in reports[0]


def test_a_folder_of_tokens_goes_on(begun):
    tokens = TokensSource(path="tokens")
    alone = build_corpus(dataclasses.replace(DATA, sources=(tokens,)))
    assert documents(alone) == OLD_DOCUMENTS and alone.hash == begun and SAID in alone.note
    both = build_corpus(dataclasses.replace(DATA, sources=(tokens, TextSource(path="text"))))
    assert documents(both) == 2 * OLD_DOCUMENTS and SAID in both.note, "all texts of a run have the same frame"
    fresh = build_corpus(DATA, out="fresh")
    assert documents(fresh) == [[1, *document] for document in OLD_DOCUMENTS]
    for folders in (("tokens", "fresh"), ("fresh", "tokens")):
        sources = tuple(TokensSource(path=path) for path in folders)
        with pytest.raises(ValueError, match=r"have others around each text than by that of \w+: build them again"):
            build_corpus(dataclasses.replace(DATA, sources=sources))


def test_a_classifier_goes_on_with_the_letters_of_then(begun):
    """do_lower_case did not count beside a tokenizer.json, which is lowercase here."""
    library = json.loads((GOLDEN / "tokenizers.json").read_text(encoding="utf-8"))["libraries"]["wordpiece"]
    Path("bert").mkdir()
    Path("bert", "tokenizer.json").write_text(json.dumps(library))
    Path("bert", "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    Path("rows.jsonl").write_text('{"text": "HELLO", "label": 0}\n{"text": "hello", "label": 1}\n')
    rows = JsonlSource(path="rows.jsonl", label="label")
    data = dataclasses.replace(DATA, sources=(rows,), tokenizer=FileTokenizer(path="bert"), task="classification")
    assert documents(build_corpus(data)) == [[2, 6, 3], [2, 5, 3]] and not build_corpus(data).note
    old = build_corpus(data, begun=CLASSIFIER)
    assert documents(old) == [[2, 5, 3], [2, 5, 3]] and old.hash == CLASSIFIER
    assert "when tokenizer.json and tokenizer_config.json were all that counted" in old.note


CLASSIFIER = (
    "831d7fa4fe4798919194db793491d9cffa2edecab6a296f75be8df6b682ddb8d"  # the hash of these rows, made by 4dad114
)
RECORDED_HASHES = {  # of the same text, made by 4dad114
    "byte": "fb7dccef288f4d85",
    "bpe": "dfba1814d1e183cd",
    "file": "cc58c6107d1ed615",
    "gpt2": "cc58c6107d1ed615",
    "masked wordpiece": "3abd38e1b65c9774",
    "masked vocab.txt": "893b5c96d7c2b7e5",
}


def test_data_without_a_frame_keep_their_hash(begun):
    libraries = json.loads((GOLDEN / "tokenizers.json").read_text(encoding="utf-8"))["libraries"]
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    own = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, library, settings in (
        ("file", "bytes", plain),
        ("wordpiece", "wordpiece", plain),
        ("gpt2", "bytes", own),
    ):
        Path(name).mkdir()
        Path(name, "tokenizer.json").write_text(json.dumps(libraries[library]))
        Path(name, "tokenizer_config.json").write_text(json.dumps(settings))
    Path("bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##a", "##b", "##c"]
    Path("bert", "vocab.txt").write_text("\n".join(words) + "\n")
    made: dict[str, tuple[TokenizerConfig, DataTask]] = {
        "byte": (ByteTokenizer(), "language_model"),
        "bpe": (BPETokenizer(vocab_size=260), "language_model"),
        "file": (FileTokenizer(path="file"), "language_model"),
        "gpt2": (FileTokenizer(path="gpt2"), "language_model"),
        "masked wordpiece": (FileTokenizer(path="wordpiece"), "masked"),
        "masked vocab.txt": (FileTokenizer(path="bert"), "masked"),
    }
    for name, (tokenizer, task) in made.items():
        corpus = build_corpus(dataclasses.replace(DATA, tokenizer=tokenizer, task=task))
        assert corpus.hash.startswith(RECORDED_HASHES[name]) and not corpus.note, name
