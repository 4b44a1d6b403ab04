"""A kind of source is one file with its dataclass, named in one place: a toy kind goes from YAML to rows of tokens."""

import dataclasses
from typing import Literal

import numpy as np
import pytest

from dsjax.config.docs import attribute_docs
from dsjax.config.load import from_dict
from dsjax.data.config import ByteTokenizer, DataConfig
from dsjax.data.corpus.build import build_corpus
from dsjax.data.rows.mixture import Rows
from dsjax.data.text.document import Document
from dsjax.data.text.source import TextSourceKind, list_path
from dsjax.data.text.sources import SourceConfig

PLAY = "ROMEO: Shall I hear more?\nJULIET: What man art thou?\nROMEO: By a name\nROMEO: \n"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlaySource(TextSourceKind):
    """Plays; a document is what somebody says."""

    path: str
    """A .play file, or a folder of them."""
    kind: Literal["play"] = "play"
    """The kind of source."""
    speaker: str = ""
    """Who speaks; '' takes everybody."""
    weight: float = 1.0
    """Share of this source's rows in the mixture, before normalisation."""

    def open(self):
        return list_path(self, self.path, endings=(".play",))

    def read(self, part, undecodable, tally):
        for path in part.files:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                speaker, _, text = line.partition(": ")
                if self.speaker in ("", speaker):
                    yield Document(f"{path.name}:{number}", text)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlayData(DataConfig):
    """The union with one name more."""

    sources: tuple[SourceConfig | PlaySource, ...]
    """What is read."""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.play").write_text(PLAY)
    (tmp_path / "b.txt").write_text("other text")
    source = {"kind": "play", "path": str(tmp_path), "speaker": "ROMEO"}
    rest = {"tokenizer": {"kind": "byte"}, "sequence_length": 32, "pack": "none", "validation_fraction": 0.0}
    return from_dict(PlayData, {"sources": [source], "cache_dir": str(tmp_path / "cache"), **rest})


def test_a_toy_source_from_yaml_to_rows(config):
    assert config.sources == (PlaySource(path=config.sources[0].path, speaker="ROMEO"),)
    said = []
    corpus = build_corpus(config, report=said.append)
    assert corpus.document_names["train"] == ["a.play:1", "a.play:3"]
    assert said[0].endswith("1 file read (kind play), skipped: 1 .txt") and "left out 1 document without" in said[1]
    rows = Rows.of(corpus, config, split="train")
    tokens, mask = rows.plain(np.arange(rows.num_rows))
    texts = [bytes(some[real].astype(np.uint8)).decode() for some, real in zip(tokens, mask, strict=True)]
    assert texts == ["Shall I hear more?", "By a name"]


def test_its_settings_decide_the_corpus(config):
    speaker = dataclasses.replace(config.sources[0], speaker="JULIET")
    other = build_corpus(dataclasses.replace(config, sources=(speaker,)))
    assert build_corpus(config).hash not in ("", other.hash) and other.train[0].num_documents == 1
    heavier = dataclasses.replace(config.sources[0], weight=3.0)
    assert build_corpus(dataclasses.replace(config, sources=(heavier,))).hash == build_corpus(config).hash


def test_what_is_said_of_it(config, tmp_path):
    assert attribute_docs(PlaySource)["speaker"] == "Who speaks; '' takes everybody."
    with pytest.raises(ValueError, match=r"sources.0.kind.*play"):
        from_dict(PlayData, {"sources": [{"kind": "plays", "path": "x"}]})
    (tmp_path / "a.play").unlink()
    with pytest.raises(ValueError, match=r"source of kind play: no file that matches .play and has content.*1 .txt"):
        build_corpus(config)


def test_labels_are_asked_of_a_kind_that_has_rows_with_keys(config):
    with pytest.raises(ValueError, match=r"needs labels, which a source of kind play does not have"):
        build_corpus(dataclasses.replace(config, task="classification", tokenizer=ByteTokenizer()))
