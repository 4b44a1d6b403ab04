"""Texts as unit vectors, pooled from a model's features over a text's tokens (arXiv 1908.10084)."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32

from dsjax.data.rows.single_rows import padded
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.inference.open import TrainedModel
from dsjax.inference.sentence_encoder import SentenceEncoder, normalised, read_sentence_encoder
from dsjax.layers.pooling import Pooling, pooled
from dsjax.models.generate import bucket
from dsjax.models.transformer import Transformer

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
        trained: from `open_model`; of any family and task, its head is not used. Files of sentence-transformers in its
            folder say how features become vectors; without them it is the mean.
        texts: at least one; none is empty.

    Raises:
        ValueError: no text, or an empty one; files of sentence-transformers that cannot be read or ask for what is not
            implemented.
    """
    if not texts:
        raise ValueError("there is no text to embed; give at least one")
    encoder, tokenizer = read_sentence_encoder(trained.path), trained.tokenizer
    whole = [encoder.prompt + text for text in texts]
    ids = tokenizer.encode_marked([text.lower() for text in whole] if encoder.lower else whole)
    # An encoder puts [CLS] and [SEP] around nothing, too.
    if empty := [i + 1 for i, (text, row) in enumerate(zip(texts, ids, strict=True)) if not text.strip() or not row]:
        raise ValueError(f"text {empty[0]} of {len(texts)} is empty; a text needs at least one word")
    skipped = 0 if encoder.pools_prompt or not encoder.prompt else _prompt_length(encoder, tokenizer)
    positions = trained.model.architecture.max_positions or 0
    limit = min((length for length in (encoder.max_length, positions) if length), default=0)
    rows = [row[:limit] if limit else row for row in ids]
    # The end mark stays when the middle of the text does not.
    rows = [[*row[:-1], full[-1]] if len(row) < len(full) else row for row, full in zip(rows, ids, strict=True)]
    if (shortest := min(map(len, rows))) <= skipped:
        raise ValueError(f"the prompt {encoder.prompt!r} of {skipped} tokens fills the {shortest} that a text may have")
    graph, state = nnx.split(trained.model, nnx.Param)
    params = nnx.to_pure_dict(state)
    cuts = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    widths = [bucket(max(map(len, cut))) for cut in cuts]
    widths = [min(width, limit) if limit else width for width in widths]
    compute = partial(_vectors, graph, params, poolings=encoder.poolings, skipped=skipped)
    parts = [compute(*padded(cut, width)) for cut, width in zip(cuts, widths, strict=True)]
    vectors = np.concatenate([np.asarray(part) for part in parts])[: len(rows)]
    for step in encoder.steps:
        vectors = step(vectors)
    return Embedded(normalised(vectors), tuple(len(row) for row in ids), limit)


def _prompt_length(encoder: SentenceEncoder, tokenizer: Tokenizer) -> int:
    """Tokens of the prompt, a mark before it among them, but not one behind it."""
    (ids,) = tokenizer.encode_marked([encoder.prompt.lower() if encoder.lower else encoder.prompt])
    ends = {tokenizer.end_of_text, tokenizer.special_id("sep_token"), tokenizer.special_id("eos_token")}
    return len(ids) - (ids[-1] in ends)


def cosines(vectors: Float32[np.ndarray, "N D"]) -> Float32[np.ndarray, "N N"]:
    """The cosine of each pair of unit vectors.

    Example:
        >>> cosines(np.array([[1, 0], [0.6, 0.8]], np.float32)).round(3).tolist()
        [[1.0, 0.6000000238418579], [0.6000000238418579, 1.0]]
    """
    return vectors @ vectors.T


@jax.jit(static_argnames=("graph", "poolings", "skipped"))
def _vectors(graph, params, ids_BT: jax.Array, mask_BT: jax.Array, *, poolings: tuple[Pooling, ...], skipped: int):
    model: Transformer = nnx.merge(graph, params)
    # Padding is a document of its own, which no token of the text sees.
    features, _ = model.features(ids_BT, segments=mask_BT)
    counted = mask_BT.astype(bool) & (jnp.arange(mask_BT.shape[1]) >= skipped)
    return jnp.concatenate([pooled(features, counted, kind) for kind in poolings], axis=-1)
