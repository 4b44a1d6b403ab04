"""Settings of data: sources, tokenizers, rows of tokens, curricula."""

import dataclasses
from typing import Literal

from dsjax.data.text.source import TextSourceKind
from dsjax.data.text.sources import JsonlSource as JsonlSource
from dsjax.data.text.sources import ParquetSource as ParquetSource
from dsjax.data.text.sources import SourceConfig, StdlibSource
from dsjax.data.text.sources import TextSource as TextSource
from dsjax.data.text.sources import TokensSource as TokensSource


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ByteTokenizer:
    """256 bytes and one end-of-text token (id 256)."""

    kind: Literal["byte"] = "byte"
    """The kind of tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BPETokenizer:
    """A byte-level BPE trained on the training documents, cached under a hash of them.

    For the task masked it has a token [MASK]. With a source of kind `tokens` nothing is trained: that folder's
    tokenizer is used.
    """

    kind: Literal["bpe"] = "bpe"
    """The kind of tokenizer."""
    vocab_size: int = 4096
    """Tokens, the end-of-text token (id 0) and the 256 bytes among them."""

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes, end of text); got {self.vocab_size}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileTokenizer:
    """An existing tokenizer: a tokenizer.json of the `tokenizers` library, WordPiece's vocab.txt, GPT-2's vocab.json
    with merges.txt, each with the other files of its folder, or a GGUF file's."""

    path: str
    """The file, or a folder that holds a tokenizer.json, a vocab.txt or a vocab.json."""
    kind: Literal["file"] = "file"
    """The kind of tokenizer."""
    end_of_text: str = ""
    """The token put after each document; '' takes eos_token of the files beside it or of the GGUF file, else the first
    of <|endoftext|>, </s>, <|im_end|>, [SEP] that it has, else the eos_token_id of the model's configs."""


TokenizerConfig = ByteTokenizer | BPETokenizer | FileTokenizer

DataTask = str
"""Name of a task: data/rows/formats.py has its rows, objectives/registry.py its loss."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """From sources to rows of `sequence_length` tokens."""

    sources: tuple[SourceConfig, ...] = (StdlibSource(),)
    """The sources to read; several are mixed by their weights."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=BPETokenizer)
    """The tokenizer."""
    task: str = "from_model"
    """Objective of the run, and its rows; from_model is settled by model.task when a run starts. language_model: the
    next token; masked: tokens hidden from a model that reads both ways; classification: one text a row, cut to the row,
    with its label."""
    mask_share: float = 0.15
    """Share of tokens that the task masked hides: 80% of them become [MASK], 10% another token, 10% stay."""
    sequence_length: int = 1024
    """Tokens in a row (T)."""
    pack: Literal["best_fit", "stream", "none"] = "best_fit"
    """best_fit: documents are put whole into rows where they fit; stream: cut from one long stream; none: one a row."""
    isolate_documents: bool = True
    """In packed rows attention and loss stop at document ends and positions restart; false lets attention and
    positions run on, and in a stream the loss too."""
    validation_fraction: float = 0.02
    """Share of the documents kept apart for validation, chosen by a hash of each document."""
    validation_sources: tuple[SourceConfig, ...] = ()
    """Validate on these instead of on a fraction."""
    undecodable: Literal["error", "replace", "skip"] = "error"
    """Treatment of bytes that are not UTF-8: stop and name the file, put U+FFFD, or leave the document out."""
    cache_dir: str = ""
    """Folder in which tokens and indices are kept; '' means $XDG_CACHE_HOME/dsjax or ~/.cache/dsjax."""
    shuffle_seed: int = 0
    """Seed of the order of rows."""
    read_threads: int = 2
    """Threads that assemble batches."""
    prefetch: int = 4
    """Batches kept ready."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must name at least one source")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2; got {self.sequence_length}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1); got {self.validation_fraction}")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"mask_share must be between 0 and 1; got {self.mask_share}")
        for source in self.sources + self.validation_sources:
            if source.weight <= 0:
                raise ValueError(f"a source's weight must be above 0; got {source.weight} for {source.kind}")
        if self.read_threads < 1 or self.prefetch < 1:
            raise ValueError(f"read_threads and prefetch must be at least 1; got {self.read_threads}, {self.prefetch}")

    @property
    def has_pairs(self) -> bool:
        """Whether texts come in pairs."""
        texts = [s for s in self.sources + self.validation_sources if isinstance(s, TextSourceKind)]
        return any(source.keys is not None and source.keys.pair for source in texts)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FixedLinear:
    """Difficulty grows evenly: floor(step / steps * (max - min) + min), down to a multiple of `quantum`."""

    kind: Literal["fixed_linear"] = "fixed_linear"
    """The schedule."""
    steps: int
    """The step at which it reaches its largest value."""
    quantum: int = 8
    """Difficulties are multiples of this (difficulty_step); the largest value is reached all the same."""

    def __post_init__(self) -> None:
        _check_growth(self.steps, self.quantum)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FixedRoot:
    """The same with (step / steps)^(1 / degree): fast at first, slow at the end."""

    kind: Literal["fixed_root"] = "fixed_root"
    """The schedule."""
    steps: int
    """The step at which it reaches its largest value."""
    degree: int = 2
    """2 is the square root."""
    quantum: int = 1
    """Difficulties are multiples of this (difficulty_step); the largest value is reached all the same."""

    def __post_init__(self) -> None:
        _check_growth(self.steps, self.quantum)
        if self.degree < 1:
            raise ValueError(f"degree must be 1 or more; got {self.degree}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FixedDiscrete:
    """A list of difficulties: the i-th up to and with the step until[i], the last one afterwards."""

    kind: Literal["fixed_discrete"] = "fixed_discrete"
    """The schedule."""
    difficulties: tuple[int, ...]
    """The values, in order."""
    until: tuple[int, ...]
    """The last step of each value but the last."""

    def __post_init__(self) -> None:
        if not self.difficulties or len(self.until) != len(self.difficulties) - 1:
            raise ValueError(
                "until must have one entry less than difficulties, of which there must be one at least; got "
                f"{len(self.until)} and {len(self.difficulties)}"
            )
        if list(self.until) != sorted(set(self.until)) or min(self.until, default=1) < 1:
            raise ValueError(f"until must be steps from 1 on that grow; got {list(self.until)}")
        if min(self.difficulties) < 1:
            raise ValueError(f"difficulties must be 1 or more; got {list(self.difficulties)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CustomSchedule:
    """A function of your own: step (from 1) -> difficulty."""

    kind: Literal["custom"] = "custom"
    """The schedule."""
    function: str
    """Its dotted path, such as my_package.my_module.my_function; the module must be importable."""


DifficultySchedule = FixedLinear | FixedRoot | FixedDiscrete | CustomSchedule


def _check_growth(steps: int, quantum: int) -> None:
    if steps < 1 or quantum < 1:
        raise ValueError(f"steps and quantum must be 1 or more; got {steps} and {quantum}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DifficultyConfig:
    """Rows that may be drawn: those that are not more difficult than the schedule says."""

    metric: str = "vocab_rarity"
    """Metric of a row's difficulty: vocab_rarity, length, length_then_rarity, or the dotted path of a function of your
    own (tokens int32 [B, T], mask bool [B, T]) -> whole numbers [B]."""
    by: Literal["percentile", "value"] = "percentile"
    """Unit of min, max and the schedule: percent of the rows, easiest first, or values of the metric."""
    min: int = 1
    """The first difficulty."""
    max: int = 100
    """The last difficulty; by value, the rows above it are never drawn."""
    schedule: DifficultySchedule
    """Schedule of its growth."""

    def __post_init__(self) -> None:
        _check_bounds(self.min, self.max, self.schedule)
        if self.by == "percentile" and self.max > 100:
            raise ValueError(f"max must be at most 100 by percentile; got {self.max}; use by: value for values")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LengthConfig:
    """Length of rows over time: sequence-length warm-up (arXiv 2108.06084)."""

    mode: Literal["truncate", "reshape"] = dataclasses.field(default="truncate", metadata={"was": "how"})
    """truncate: the rest of each row is left out; reshape: rows are cut into more, shorter ones (in lengths of the
    compiled programs), so that a step keeps its tokens."""
    min: int = 64
    """Tokens of the first rows."""
    max: int = 0
    """Tokens of the last rows; 0 means data.sequence_length."""
    schedule: DifficultySchedule
    """Schedule of their growth."""

    def __post_init__(self) -> None:
        _check_bounds(self.min, self.max, self.schedule)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """Easy before difficult (arXiv 2212.03597); a pure function of the step."""

    difficulty: tuple[DifficultyConfig, ...] = ()
    """Limits of difficulty, for all sources alike; of several metrics a row must be easy enough by all."""
    length: LengthConfig | None = None
    """Length of rows over time; null leaves them at data.sequence_length."""
    cut_to_longest: bool = False
    """Leave out the columns of a batch that hold padding in all its rows (for pack: none), in steps whose layers see
    all tokens. Counted neither in the tokens of a step, which follow from the schedules alone, nor in what these save;
    `train.max_programs` bounds its programs, which `dsjax plan` does not know."""

    def __post_init__(self) -> None:
        if not self.difficulty and self.length is None and not self.cut_to_longest:
            raise ValueError("a curriculum needs difficulty, length or cut_to_longest")
        metrics = [one.metric for one in self.difficulty]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"each metric may be given once; got {metrics}")


def _check_bounds(least: int, most: int, schedule: DifficultySchedule) -> None:
    """A `most` of 0 is not known yet."""
    if least < 1 or (most and most < least):
        raise ValueError(f"min must be 1 or more and not above max; got min {least} and max {most}")
    if isinstance(schedule, FixedDiscrete):
        given = list(schedule.difficulties)
        if most and not least <= min(given) <= max(given) <= most:
            raise ValueError(f"difficulties {given} must lie between min = {least} and max = {most}: change these")
        if min(given) < least:
            raise ValueError(f"difficulties {given} must not be below min = {least}: lower it")
    quantum = schedule.quantum if isinstance(schedule, FixedLinear | FixedRoot) else 1
    if least < quantum:
        raise ValueError(
            f"min = {least} is rounded down to a multiple of quantum = {quantum}, which is 0: nothing would be left; "
            f"use a min of {quantum} or more, or a smaller quantum"
        )
