"""Evaluation of a classifier on labelled texts.

Shapes: N rows, B rows of a batch, T tokens, C classes.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from dsjax.data.config import JsonlSource, ParquetSource
from dsjax.data.rows.single_rows import Row, encode_rows
from dsjax.data.text.document import Undecodable
from dsjax.data.text.read import read_documents
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.evaluate.metrics import accuracy, confusion, f1, matthews
from dsjax.models.generate import bucket
from dsjax.models.transformer import Transformer

BATCH_TOKENS = 8192
"""Tokens at a time, unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Texts with their classes.

    Attributes:
        rows: each text, or pair of texts, as the model reads it.
        labels: numbers of the classes, int64 [N].
    """

    rows: list[Row]
    labels: Int64[np.ndarray, " N"]

    @property
    def num_cut(self) -> int:
        """Texts that were longer than a row."""
        return sum(row.cut for row in self.rows)


def read_labelled(
    sources: Iterable[JsonlSource | ParquetSource],
    tokenizer: Tokenizer,
    *,
    names: Sequence[str],
    length: int,
    undecodable: Undecodable = "error",
) -> Labelled:
    """Read all texts of some sources with their labels.

    Args:
        sources: where they are; each names its label.
        tokenizer: the model's own.
        names: of the model's classes. A label that is a string is looked up there, a number is that of the class.
        length: T; longer texts are cut.
        undecodable: what to do with bytes that are not UTF-8.

    Raises:
        ValueError: a path or a line that cannot be read, a label that the model does not have, no text at all.
    """
    documents, labels = [], []
    numbers = {name: number for number, name in enumerate(names)}
    for source in sources:
        for document in read_documents([source], undecodable=undecodable):
            label = document.label
            number = numbers.get(label, -1) if isinstance(label, str) else label
            if number is None or not 0 <= number < len(names):
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ValueError(
                    f"{source.path}: {document.name} has the label {label!r}; the model's are {shown} (0 to "
                    f"{len(names) - 1})"
                )
            documents.append(document)
            labels.append(number)
    if not documents:
        raise ValueError("there is nothing to evaluate: no line has any text")
    rows = encode_rows(tokenizer, [d.text for d in documents], [d.pair for d in documents], length=length)
    return Labelled(rows, np.array(labels, np.int64))


def predict(model: Transformer, rows: Sequence[Row], *, batch_tokens: int = BATCH_TOKENS) -> Float64[np.ndarray, "N C"]:
    """The logits of each row; rows of about one length are computed together, so that few programs are compiled.

    Args:
        model: of the task classification.
        rows: what it reads.
        batch_tokens: tokens at a time.
    """
    logits = np.zeros((len(rows), model.config.num_labels), np.float64)
    started: list[tuple[np.ndarray, jax.Array]] = []
    for chosen, (tokens, mask, types) in _batches(rows, batch_tokens, limit=model.architecture.max_positions):
        started.append((chosen, model(jnp.asarray(tokens), jnp.asarray(mask), token_types=jnp.asarray(types))))
    for chosen, values in started:
        logits[chosen] = np.asarray(values, np.float64)[: len(chosen)]
    return logits


def _batches(
    rows: Sequence[Row], batch_tokens: int, *, limit: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Which rows, and their tokens, mask and token types [B, T]; rows that are left over repeat nothing."""
    widths = np.array([bucket(len(row.ids)) for row in rows])
    for width in np.unique(widths).tolist():
        numbers = np.flatnonzero(widths == width)
        columns = min(width, limit) if limit else width
        size = max(1, min(batch_tokens // columns, len(numbers)))
        for at in range(0, len(numbers), size):
            chosen = numbers[at : at + size]
            tokens, mask, types = (np.zeros((size, columns), np.int32) for _ in range(3))
            mask[len(chosen) :, 0] = 1  # rows that do not exist have one token, so that no softmax is over nothing
            for place, number in enumerate(chosen):
                row = rows[number]
                count = len(row.ids)
                tokens[place, :count], mask[place, :count] = row.ids, 1
                types[place, count - row.num_second : count] = 1
            yield chosen, (tokens, mask, types)


def metrics(labelled: Labelled, logits: Float64[np.ndarray, "N C"]) -> dict[str, tuple[float | int, str]]:
    """Metrics to report: name -> (value, how it was obtained).

    Example:
        >>> labelled = Labelled([Row([1], 0, False)] * 4, np.array([0, 1, 1, 1]))
        >>> found = metrics(labelled, np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]]))
        >>> {name: round(value, 4) for name, (value, _) in found.items()}
        {'accuracy': 0.75, 'f1': 0.8, 'matthews': 0.5774, 'nats_per_row': 0.6269, 'majority_accuracy': 0.75, 'rows': 4}
    """
    labels, num_classes = labelled.labels, logits.shape[1]
    counts = confusion(labels, logits.argmax(1), num_classes=num_classes)
    top = logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(labels)), labels]
    which = "of class 1" if num_classes == 2 else "mean over the classes that occur or were predicted"
    cut = f"; {labelled.num_cut:,} of them were longer than a row and lost their ends" if labelled.num_cut else ""
    return {
        "accuracy": (accuracy(counts), "share of rows whose likeliest class is right"),
        "f1": (f1(counts), f"2 TP / (2 TP + FP + FN), {which}"),
        "matthews": (matthews(counts), "correlation of Matthews; 0 is guessing"),
        "nats_per_row": (math.fsum(losses) / len(losses), "mean cross-entropy"),
        "majority_accuracy": (int(np.bincount(labels).max()) / len(labels), "of always saying these rows' commonest"),
        "rows": (len(labels), f"counted{cut}"),
    }
