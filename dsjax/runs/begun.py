"""Choices that a resumed run has made already, and that a new run would make otherwise.

Two things that the weights say were not asked for before: their own rates of dropout, and the names of their classes. A
run keeps those that it began with.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsjax.checkpoint.manifest import read_json
from dsjax.data.corpus.build import Corpus
from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.labels import CLASS
from dsjax.models.config import AnyModelConfig, ModelConfig, PretrainedConfig
from dsjax.models.formats.config_json import given_label_names
from dsjax.models.formats.pretrained import open_weights
from dsjax.runs.folder import read_config


def as_begun(model: AnyModelConfig, folder: Path | None) -> AnyModelConfig:
    """The model's config with the rates of dropout of the run in `folder`, where it says to take the weights'."""
    if folder is None or not isinstance(model, PretrainedConfig):
        return model
    before = read_config(folder).model
    attention = before.attention_dropout if model.attention_dropout is None else model.attention_dropout
    dropout = before.dropout if model.dropout is None else model.dropout
    return dataclasses.replace(model, dropout=dropout, attention_dropout=attention)


def with_class_names(corpus: Corpus, model: ModelConfig, folder: Path | None) -> Corpus:
    """The corpus with the numbers and the names of the classes that the model has, all of them.

    Args:
        corpus: of which the labels are numbered in the order of their names.
        model: a model whose weights may name its classes.
        folder: of the run that is gone on with: its names hold; None for a new run.

    Raises:
        ValueError: some labels are names of the model's classes and some are not.
    """
    if not corpus.labels:
        return corpus
    if folder is not None:
        names = tuple(read_json(folder / "data.json").get("labels", ()))
    else:
        names = given_label_names(open_weights(model.init_from).config, model) if model.init_from else ()
    numbers = class_numbers(corpus.labels, names)
    if numbers is None:
        return corpus
    move = lambda store: _renumbered(store, np.array(numbers, np.int32))
    return dataclasses.replace(
        corpus, labels=names, train=[move(s) for s in corpus.train], validation=[move(s) for s in corpus.validation]
    )


def class_numbers(labels: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The number of each label among the names of a model's classes; None where the labels' own order holds.

    Labels that are whole numbers are numbers of classes. Labels of which none is a name are another task's.

    Example:
        >>> names = ("positive", "neutral", "negative")
        >>> class_numbers(("negative", "positive"), names), class_numbers(("0", "1"), names)
        ([2, 0], [0, 1])
        >>> class_numbers(("ham", "spam"), names) is None
        True
    """
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [label for label in labels if label not in numbers]
    if not unknown:
        return [numbers[label] for label in labels] if names else None
    if list(labels) == [str(number) for number in range(len(labels))] and len(labels) <= len(names):
        return list(range(len(labels)))
    if len(unknown) == len(labels):
        return None
    raise ValueError(
        f"the data has the labels {json.dumps(unknown[:8])}, which are none of the model's classes "
        f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}), and others that are; name them as the model "
        "does, or give a model without id2label in config.json"
    )


def _renumbered(store: TokenStore, numbers: np.ndarray) -> TokenStore:
    if store.classes is None:
        return store
    classes = np.array(store.classes)
    classes[:, CLASS] = numbers[classes[:, CLASS]]
    return dataclasses.replace(store, classes=classes)
