"""Perplexity of text: a window slides over each document, and every token is scored once.

A window reads T tokens (`length`) and predicts the T after the first. The next one begins S tokens (`stride`) later
and scores only what the one before did not, so that with j tokens before it in its document a token is predicted from
at least min(j, T - S + 1) of them. A document's first token is predicted from what the tokenizer puts before a
text, as in training (Llama's <s>). If it puts nothing there, the first token is read but not scored, for no model was
trained to predict from nothing, unless an end-of-text token is put before it.

Shapes: B windows, T tokens, N windows of a document, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int64

from dsjax.data.corpus.encode import encode_text
from dsjax.data.text.document import Undecodable
from dsjax.data.text.read import read_documents
from dsjax.data.text.source import TextSourceKind
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.layers.cross_entropy import token_losses
from dsjax.models.generate import bucket
from dsjax.models.transformer import Transformer

BATCH_TOKENS = 8192
"""Tokens at a time on each device, unless told otherwise."""
_CHUNK_ELEMENTS = 1 << 26  # logits that exist at a time on each device


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents as a model reads them.

    Attributes:
        documents: their tokens, int32, with what is put before them; the first of each is read but not scored.
        num_bytes: UTF-8 bytes of the tokens that are scored.
        num_lossy: documents that the tokenizer does not give back as they were.
        before: what is put before each of them, in words; '' for nothing.
    """

    documents: list[np.ndarray]
    num_bytes: int
    num_lossy: int
    before: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over the scored tokens of some documents.

    Attributes:
        nats: negative log-likelihood of all scored tokens, summed in float64.
        num_tokens: how many were scored.
    """

    nats: float
    num_tokens: int


def read_text(
    sources: Iterable[TextSourceKind], tokenizer: Tokenizer, *, score_first: bool, undecodable: Undecodable = "error"
) -> Text:
    """Read and tokenise all documents of some sources.

    Args:
        sources: where they are.
        tokenizer: the model's own.
        score_first: put an end-of-text token before each document, so that its first token can be scored, where the
            tokenizer puts nothing there.
        undecodable: what to do with bytes that are not UTF-8.

    Raises:
        ValueError: a path that does not exist, holds no text or cannot be read.
    """
    lead, before = tokenizer.begin, "what its tokenizer puts before a text"
    if not lead:
        lead, before = ([tokenizer.end_of_text], "an end-of-text token") if score_first else ([], "")
    documents, num_bytes, num_lossy = [], 0, 0
    for document in read_documents(sources, undecodable=undecodable):
        ids = encode_text(document.text, tokenizer)
        num_lossy += tokenizer.decode(ids) != document.text
        num_bytes += len(document.text.encode())
        if not lead and ids:
            num_bytes -= int(tokenizer.byte_lengths[ids[0]])
        documents.append(np.array([*lead, *ids], np.int32))
    return Text(documents, num_bytes, num_lossy, before)


def windows(num_tokens: int, *, length: int, stride: int) -> Int64[np.ndarray, "N 3"]:
    """The windows of a document: (begin, end, first), for inputs [begin:end] and targets [begin + 1:end + 1].

    The targets from `first` on are scored: over all windows each of 1 .. num_tokens - 1 once.

    Args:
        num_tokens: tokens of the document.
        length: T, inputs of a window, at most.
        stride: S, in 1 .. length.

    Raises:
        ValueError: a length below 1, or a stride that is not in 1 .. length.

    Example:
        >>> windows(8, length=4, stride=2).tolist()
        [[0, 4, 1], [2, 6, 5], [4, 7, 7]]
    """
    if length < 1 or not 1 <= stride <= length:
        raise ValueError(f"length must be at least 1 and stride in 1 .. length; got {length} and {stride}")
    num_targets = num_tokens - 1
    if num_targets < 1:
        return np.zeros((0, 3), np.int64)
    count = 1 + max(0, -(-(num_targets - length) // stride))
    begin = np.arange(count, dtype=np.int64) * stride
    end = np.minimum(begin + length, num_targets)
    first = begin + length - stride + 1
    first[0] = 1
    return np.stack([begin, end, first], axis=1)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows of about one size, padded on the right to one width, which nothing before it sees."""

    tokens: Int[np.ndarray, "B T"]
    """int32."""
    targets: Int[np.ndarray, "B T"]
    """int32."""
    scored: Bool[np.ndarray, "B T"]
    """Which targets count."""


class WindowBatches:
    """The windows of some documents, those of about the same size together, so that few programs are compiled.

    Args:
        documents: tokens of each.
        length: T, inputs of a window, at most.
        stride: S, tokens between the beginnings of windows.
        batch_tokens: tokens in a batch, about.
        multiple: the number of rows is a multiple of this; rows that are left over score nothing.

    Example:
        >>> batches = WindowBatches([np.arange(8)], length=4, stride=2, batch_tokens=8, multiple=1)
        >>> len(batches), sum(int(batch.scored.sum()) for batch in batches)
        (2, 7)
    """

    def __init__(
        self, documents: Sequence[np.ndarray], *, length: int, stride: int, batch_tokens: int, multiple: int
    ) -> None:
        self._documents = documents
        cut = [np.zeros((0, 4), np.int64)]
        for number, document in enumerate(documents):
            rows = windows(len(document), length=length, stride=stride)
            cut.append(np.insert(rows, 0, number, axis=1))
        table = np.concatenate(cut)
        widths = np.array([min(length, bucket(int(end - begin))) for _, begin, end, _ in table], np.int64)
        self._batches: list[tuple[int, int, np.ndarray]] = []
        for width in np.unique(widths).tolist():
            rows = table[widths == width]
            size = max(1, batch_tokens // (width * multiple)) * multiple
            size = min(size, -(-len(rows) // multiple) * multiple)
            self._batches += [(size, width, rows[at : at + size]) for at in range(0, len(rows), size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for size, width, rows in self._batches:
            tokens, targets = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
            scored = np.zeros((size, width), bool)
            for row, (number, begin, end, first) in enumerate(rows):
                document = self._documents[number]
                tokens[row, : end - begin] = document[begin:end]
                targets[row, : end - begin] = document[begin + 1 : end + 1]
                scored[row, first - begin - 1 : end - begin] = True
            yield Batch(tokens, targets, scored)


@partial(jax.jit, static_argnames=("graph", "chunks"))
def _losses(graph, params, tokens, targets, *, chunks: int) -> Float[Array, "B T"]:
    """The loss of every place, the logits a chunk of places at a time."""
    model: Transformer = nnx.merge(graph, params)
    (features_BTD, _), table_VD = model.features(tokens), model.table()
    if chunks == 1:
        return token_losses(features_BTD, table_VD, targets)
    cut = lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0)
    losses = jax.lax.map(lambda piece: token_losses(piece[0], table_VD, piece[1]), (cut(features_BTD), cut(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(tokens.shape)


def check_windows(model: Transformer, *, length: int, stride: int, batch_tokens: int) -> None:
    """Refuse windows that a model cannot read, before the text is read.

    Args:
        model: the model.
        length: T, tokens that a window reads.
        stride: S, tokens between the beginnings of windows.
        batch_tokens: tokens at a time on each device.

    Raises:
        ValueError: more places than the model has positions, a stride that leaves tokens out, numbers below 1.
    """
    limit = model.architecture.max_positions
    if limit and length > limit:
        raise ValueError(f"a window of {length} tokens is longer than the {limit} positions that the model has")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}")
    windows(0, length=length, stride=stride)


def score(
    model: Transformer,
    documents: Sequence[np.ndarray],
    *,
    length: int,
    stride: int,
    batch_tokens: int = BATCH_TOKENS,
    devices: Sequence[Any] | None = None,
    progress: Callable[[int, int, Score], None] = lambda done, total, so_far: None,
) -> Score:
    """Score every token of some documents but each one's first.

    Args:
        model: the model.
        documents: tokens of each, int32.
        length: T, tokens that a window reads.
        stride: S, tokens between the beginnings of windows: smaller ones give more context and take longer.
        batch_tokens: tokens at a time on each device.
        devices: where to compute: each holds the whole model and a share of the windows; None takes all.
        progress: told after each batch how many of how many are done, and the score so far.

    Raises:
        ValueError: nothing to score, more places than the model has positions, a loss that is not finite.

    Example:
        >>> from dsjax.models.families.bloom.config import BloomConfig
        >>> from dsjax.models.families.build import create
        >>> model = create(BloomConfig(vocab_size=11, num_layers=1, model_dim=8, num_heads=2), key=jax.random.key(0))
        >>> result = score(model, [np.arange(10), np.arange(5)], length=4, stride=2)
        >>> result.num_tokens, bool(2 < result.nats / result.num_tokens < 3)
        (13, True)
    """
    check_windows(model, length=length, stride=stride, batch_tokens=batch_tokens)
    devices = jax.devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
    whole, by_rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))
    graph, state = nnx.split(model, nnx.Param)
    params = jax.device_put(nnx.to_pure_dict(state), whole)
    batches = WindowBatches(
        documents, length=length, stride=stride, batch_tokens=batch_tokens * len(devices), multiple=len(devices)
    )
    if not len(batches):
        raise ValueError("there is nothing to score: no document has a token after its first")
    total = Score(0.0, 0)
    for done, (batch, losses) in enumerate(_one_ahead(graph, params, batches, by_rows, len(devices)), start=1):
        nats = math.fsum(np.asarray(losses, np.float64)[batch.scored])
        if not math.isfinite(nats):
            raise ValueError("the model gives losses that are not finite; its parameters are damaged or have diverged")
        total = Score(total.nats + nats, total.num_tokens + int(batch.scored.sum()))
        progress(done, len(batches), total)
    return total


def _one_ahead(
    graph, params, batches: WindowBatches, by_rows: NamedSharding, num_devices: int
) -> Iterator[tuple[Batch, jax.Array]]:
    """Each batch with its losses; the next one is computed while they are read."""
    pending = None
    for batch in batches:
        rows, width = batch.tokens.shape
        tokens, targets = jax.device_put((batch.tokens, batch.targets), by_rows)
        local = rows // num_devices * width * params["embed"]["table"].shape[0]
        fits = (n for n in range(1, width + 1) if width % n == 0 and (local // n <= _CHUNK_ELEMENTS or n == width))
        started = batch, _losses(graph, params, tokens, targets, chunks=next(fits))
        if pending is not None:
            yield pending
        pending = started
    if pending is not None:
        yield pending


def metrics(text: Text, score: Score, *, length: int, stride: int) -> dict[str, tuple[float | int, str]]:
    """Metrics to report: name -> (value, how it was obtained).

    Example:
        >>> text = Text(documents=[np.arange(3)], num_bytes=4, num_lossy=0)
        >>> found = metrics(text, Score(nats=4.0, num_tokens=2), length=8, stride=4)
        >>> {name: round(value, 4) for name, (value, _) in found.items()}
        {'nats_per_token': 2.0, 'perplexity': 7.3891, 'bits_per_byte': 1.4427, 'tokens': 2, 'bytes': 4, 'documents': 1}
    """
    mean = score.nats / score.num_tokens
    context = f"from at least {length - stride + 1} tokens where its document has them"
    first = f"each document's first one after {text.before}" if text.before else "each document's first one only read"
    lossy = f"; the tokenizer changes {text.num_lossy} of them, so bytes are about right" if text.num_lossy else ""
    return {
        "nats_per_token": (mean, f"mean over all scored tokens, each {context} (window {length}, stride {stride})"),
        "perplexity": (math.exp(mean) if mean < 700 else math.inf, "exp(nats per token), of this tokenizer's tokens"),
        "bits_per_byte": (
            score.nats / math.log(2) / max(1, text.num_bytes),
            "nats of all scored tokens / ln 2 / their UTF-8 bytes",
        ),
        "tokens": (score.num_tokens, f"scored, each once; {first}; its end not scored"),
        "bytes": (text.num_bytes, "UTF-8 bytes of the scored tokens"),
        "documents": (len(text.documents), f"counted{lossy}"),
    }
