"""The corpus of a run: made by one process and opened by the others, and whether it fits the model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from dsjax.data.config import DataConfig
from dsjax.data.corpus.build import Corpus, build_corpus
from dsjax.data.curriculum.analyze import metrics_of, open_index
from dsjax.data.curriculum.draw import Curriculum
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.pipeline import longest_row
from dsjax.mesh.processes import barrier
from dsjax.models.config import ModelConfig
from dsjax.setup.assembly import Setup


def open_corpus(config: DataConfig, model: ModelConfig, *, console: Console, begun: str = "") -> Corpus:
    """The tokens; the first process makes them, the others find them made. All processes call it.

    Args:
        config: where the text is and how it becomes rows.
        model: what is trained on it.
        console: told of texts that are cut, and of ids of an older version; a quiet one shows no progress either.
        begun: the hash of the corpus of the run that goes on; '' of a new run.

    Raises:
        ValueError: as `build_corpus`; more tokens or more labels than the model has.
    """
    if jax.process_index() == 0:
        say = lambda line: console.print(line, soft_wrap=True, markup=False)
        corpus = build_corpus(config, progress=not console.quiet, begun=begun, report=say)
        barrier("corpus")
    else:
        barrier("corpus")
        corpus = build_corpus(config, begun=begun, report=lambda line: None)  # the first process has said it
    if corpus.note:
        console.print(corpus.note, soft_wrap=True, markup=False)
    check_vocabulary(corpus.tokenizer.vocab_size, model)
    if len(corpus.labels) > model.num_labels:
        shown = ", ".join(corpus.labels[:8]) + (", ..." if len(corpus.labels) > 8 else "")
        raise ValueError(
            f"the data has {len(corpus.labels)} labels ({shown}), but model.num_labels is {model.num_labels}; set it "
            f"to {len(corpus.labels)}"
        )
    if corpus.num_cut:
        texts = sum(store.num_documents for store in corpus.train + corpus.validation)
        console.print(
            f"{corpus.num_cut:,} of {texts:,} texts are longer than data.sequence_length = {config.sequence_length} "
            "tokens; their ends are cut off",
            soft_wrap=True,
            markup=False,
        )
    return corpus


def check_vocabulary(size: int, model: ModelConfig) -> None:
    """Refuse a tokenizer of more tokens than the model has.

    Raises:
        ValueError: says both numbers.
    """
    if size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} tokens, but model.vocab_size is {model.vocab_size}; set it to at least {size}"
        )


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        corpus: the tokens.
        rows: of its training split.
        curriculum: draws the rows; None leaves that to `rows`.
        longest: step -> tokens of its longest row, where batches lose the columns that nobody needs; else None.
    """

    corpus: Corpus
    rows: Rows
    curriculum: Curriculum | None = None
    longest: Callable[[int], int] | None = None


def open_rows(setup: Setup, corpus: Corpus, *, console: Console) -> RunData:
    """The rows of a run, and what draws them; the first process measures how difficult rows are. All processes call it.

    Args:
        setup: the run.
        corpus: its data.
        console: a quiet one shows no progress.

    Raises:
        ValueError: too few rows are easy enough for the first step, or a metric of the user's own fails.
    """
    config, batch_size = setup.config, setup.config.train.batch_size
    rows = Rows.of(corpus, config.data, split="train")
    metrics = () if config.curriculum is None else metrics_of(config.curriculum)
    if config.curriculum is None or not metrics:
        return RunData(corpus, rows)
    if jax.process_index() == 0:
        index = open_index(corpus, rows, config=config.data, metrics=metrics, progress=not console.quiet)
        barrier("curriculum")
    else:
        barrier("curriculum")
        index = open_index(corpus, rows, config=config.data, metrics=metrics)
    drawn = longest = None
    if difficulty := config.curriculum.difficulty:
        drawn = Curriculum(
            index.values,
            difficulty,
            batch_size=batch_size,
            seed=config.data.shuffle_seed,
            num_steps=setup.schedule.num_steps,
        )
    if config.curriculum.cut_to_longest:
        numbers = rows.numbers if drawn is None else drawn.rows
        longest = longest_row(index.values["length"], numbers, batch_size=batch_size)
    return RunData(corpus, rows, drawn, longest)


def describe(corpus: Corpus) -> dict[str, Any]:
    """The content of the run folder's data.json; of labelled data also the names of the classes, by their numbers."""
    labels = {"labels": list(corpus.labels)} if corpus.labels else {}
    return {"hash": corpus.hash, "train_tokens": corpus.train_tokens, **labels}
