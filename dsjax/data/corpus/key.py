"""Keys of corpora: hashes of the data and of every setting that decides the tokens."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from dsjax.data.config import BPETokenizer, DataConfig
from dsjax.data.corpus.parts import PlannedSource
from dsjax.data.corpus.store import FORMAT
from dsjax.data.rows.formats import task_of
from dsjax.data.text.source import Source
from dsjax.data.tokenizers.tokenizer import Tokenizer


def joined_hash(hashes: list[str]) -> str:
    """Join the hashes of several corpora to one."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def key_of(
    sources: list[PlannedSource], config: DataConfig, tokenizer: Tokenizer | None, identities: Sequence[str]
) -> str:
    """Compute a corpus's key; `identities` are those of the files of each source."""

    def describe(source: Source) -> dict[str, Any]:
        assert dataclasses.is_dataclass(source.config), "the settings of a source are a dataclass"
        settings = dataclasses.asdict(source.config)
        # The path is no part of it: the same files in another place are the same data.
        # An empty label is none either, so that data without labels are what they were before there were any.
        unset = [key for key in ("label", "text_pair") if not settings.get(key)]
        return {key: settings[key] for key in settings if key not in ("path", "weight", *unset)}

    if isinstance(config.tokenizer, BPETokenizer) and tokenizer is None:
        made_by = dataclasses.asdict(config.tokenizer) | ({"mask": True} if task_of(config) == "masked" else {})
    else:
        assert tokenizer is not None, "only a BPE is trained"
        made_by = {"hash": tokenizer.hash}
    content = {
        "format": FORMAT,
        "sources": [
            [planned.role, describe(planned.source), found] for planned, found in zip(sources, identities, strict=True)
        ],
        "validation_fraction": 0 if config.validation_sources else config.validation_fraction,
        "tokenizer": made_by,
        "undecodable": config.undecodable,
    }
    if task_of(config) != "language_model":
        content["task"] = task_of(config)
    elif tokenizer is not None and tokenizer.text_frame != ([], [tokenizer.end_of_text]):
        content["frame"] = tokenizer.text_frame
    if task_of(config) == "classification":
        content["length"] = config.sequence_length  # texts are cut to it
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
