"""The kinds of sources. To add one, write its file (see `dsjax.data.text.source`) and name its dataclass here."""

import dataclasses
from typing import Literal

from dsjax.data.text.jsonl import JsonlSource
from dsjax.data.text.parquet import ParquetSource
from dsjax.data.text.plain import TextSource
from dsjax.data.text.stdlib import StdlibSource


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokensSource:
    """Memory-mapped tokens written by `dsjax data build`, with their tokenizer and their own validation split."""

    path: str
    """The folder that `dsjax data build` wrote."""
    kind: Literal["tokens"] = "tokens"
    """The kind of source."""
    weight: float = 1.0
    """Share of this source's rows in the mixture, before normalisation."""


SourceConfig = StdlibSource | TextSource | JsonlSource | ParquetSource | TokensSource
