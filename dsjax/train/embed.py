"""Texts as unit vectors: the mean of a model's features over a text's tokens (arXiv 1908.10084)."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32

from dsjax.checkpoint.manifest import read_json
from dsjax.data.single_rows import padded
from dsjax.layers.heads import mean_pooled
from dsjax.models.generate import bucket
from dsjax.models.transformer import Transformer
from dsjax.train.source import TrainedModel

_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Vectors of texts.

    Attributes:
        vectors: [N, D], each of length 1.
        num_tokens: of each text, those that the model wants around it among them, before the cut.
        limit: tokens of a text that the model sees, 0 for no limit; longer texts were cut. It is the number of
            positions or, if that is less, what the folder of a sentence encoder says in sentence_bert_config.json.
    """

    vectors: Float32[np.ndarray, "N D"]
    num_tokens: tuple[int, ...]
    limit: int


def embed(trained: TrainedModel, texts: Sequence[str]) -> Embedded:
    """The vectors of texts, 32 at a time, padded to a power of two.

    Args:
        trained: from `open_model`; of any family and task, its head is not used.
        texts: at least one; none is empty.

    Raises:
        ValueError: no text, or an empty one; a length in sentence_bert_config.json that is none.
    """
    if not texts:
        raise ValueError("there is no text to embed; give at least one")
    ids = trained.tokenizer.encode_marked(texts)
    # An encoder puts [CLS] and [SEP] around nothing, too.
    if empty := [i + 1 for i, (text, row) in enumerate(zip(texts, ids, strict=True)) if not text.strip() or not row]:
        raise ValueError(f"text {empty[0]} of {len(texts)} is empty; a text needs at least one word")
    limit = _limit(trained)
    rows = [row[:limit] if limit else row for row in ids]
    # The end mark stays when the middle of the text does not.
    rows = [[*row[:-1], full[-1]] if len(row) < len(full) else row for row, full in zip(rows, ids, strict=True)]
    graph, state = nnx.split(trained.model, nnx.Param)
    params = nnx.to_pure_dict(state)
    cuts = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    widths = [bucket(max(map(len, cut))) for cut in cuts]
    widths = [min(width, limit) if limit else width for width in widths]
    parts = [_vectors(graph, params, *padded(cut, width)) for cut, width in zip(cuts, widths, strict=True)]
    vectors = np.concatenate([np.asarray(part) for part in parts])[: len(rows)]
    return Embedded(vectors, tuple(len(row) for row in ids), limit)


def _limit(trained: TrainedModel) -> int:
    """Tokens of a text that count: those that the vectors were trained with, where the model's folder says so."""
    positions = trained.model.architecture.max_positions or 0
    file = trained.path / "sentence_bert_config.json"
    length = read_json(file).get("max_seq_length") if file.is_file() else None
    if length is None:
        return positions
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"{file}: max_seq_length must be an integer above 0; got {length!r}")
    return min(length, positions) if positions else length


def cosines(vectors: Float32[np.ndarray, "N D"]) -> Float32[np.ndarray, "N N"]:
    """The cosine of each pair of unit vectors.

    Example:
        >>> cosines(np.array([[1, 0], [0.6, 0.8]], np.float32)).round(3).tolist()
        [[1.0, 0.6000000238418579], [0.6000000238418579, 1.0]]
    """
    return vectors @ vectors.T


@jax.jit(static_argnames="graph")
def _vectors(graph, params, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    model: Transformer = nnx.merge(graph, params)
    # Padding is a document of its own, which no token of the text sees.
    return mean_pooled(model.features(ids_BT, segments=mask_BT), mask_BT.astype(bool))
