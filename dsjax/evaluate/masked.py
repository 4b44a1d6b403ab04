"""Evaluation of an encoder on hidden tokens: loss and perplexity of masked language modelling on text.

Which tokens are hidden is fixed by the text and a seed, so that two models with one tokenizer guess the same ones.
"""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial

import jax
import numpy as np
from flax import nnx

from dsjax.data.corpus.encode import encode_documents
from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.masked import MaskedFormat, Masker
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.pipeline import FixedBatches
from dsjax.data.text.document import Undecodable
from dsjax.data.text.read import read_documents
from dsjax.data.text.source import TextSourceKind
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.models.transformer import Transformer
from dsjax.objectives.registry import OBJECTIVES

_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class MaskedScore:
    """Sums over the hidden tokens of some documents.

    Attributes:
        nats: negative log-likelihood of the hidden tokens, summed.
        num_hidden: how many there were.
        num_tokens: tokens of the text, special ones included.
        num_documents: how many.
    """

    nats: float
    num_hidden: int
    num_tokens: int
    num_documents: int


def score_masked(
    model: Transformer,
    tokenizer: Tokenizer,
    sources: Iterable[TextSourceKind],
    *,
    length: int,
    seed: int = 0,
    batch_rows: int = 32,
    undecodable: Undecodable = "error",
) -> MaskedScore:
    """Hide 15% of the tokens of some text as in training, and score them.

    Args:
        model: of the task language_model, that reads both ways.
        tokenizer: its own, with a mask token.
        sources: text.
        length: tokens in a row; documents are put whole into rows where they fit.
        seed: of what is hidden.
        batch_rows: rows at a time.
        undecodable: what to do with bytes that are not UTF-8.

    Raises:
        ValueError: a tokenizer without a mask token, nothing to score, a loss that is not finite.
    """
    if tokenizer.mask_token is None:
        raise ValueError("the model's tokenizer has no token [MASK] or <mask>; the task masked is for encoders")
    texts = [document.text for document in read_documents(sources, undecodable=undecodable)]
    documents = encode_documents(texts, tokenizer, np.dtype(np.uint32), framed=True)
    if not documents:
        raise ValueError("there is nothing to score: no document has any text")
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    store = TokenStore(tokens=np.concatenate(documents), offsets=offsets, hash="")
    masker = Masker(
        mask_token=tokenizer.mask_token, ordinary=tokenizer.byte_lengths > 0, share=_SHARE, seed=0, fixed_seed=seed
    )
    rows = Rows([store], MaskedFormat(sequence_length=length, masker=masker))
    graph, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    sums = [_loss(graph, params, batch) for batch in FixedBatches(rows, batch_size=min(batch_rows, rows.num_rows))]
    nats = math.fsum(float(loss) for loss, _ in sums)
    hidden = sum(int(count) for _, count in sums)
    if not hidden:
        raise ValueError("there is nothing to score: the text is so short that no token was hidden; give more of it")
    if not math.isfinite(nats):
        raise ValueError("the model gives losses that are not finite; its parameters are damaged or have diverged")
    return MaskedScore(nats, hidden, int(offsets[-1]), len(documents))


@partial(jax.jit, static_argnames="graph")
def _loss(graph, params, batch) -> tuple[jax.Array, jax.Array]:
    sums, _ = OBJECTIVES["masked"].sums(nnx.merge(graph, params), batch)
    return sums["loss"], sums["count"]


def metrics(score: MaskedScore, *, length: int, seed: int) -> dict[str, tuple[float | int, str]]:
    """Metrics to report: name -> (value, how it was obtained).

    Example:
        >>> found = metrics(MaskedScore(nats=6.0, num_hidden=3, num_tokens=20, num_documents=1), length=16, seed=0)
        >>> {name: round(value, 4) for name, (value, _) in found.items()}
        {'nats_per_hidden_token': 2.0, 'perplexity': 7.3891, 'hidden_tokens': 3, 'tokens': 20, 'documents': 1}
    """
    mean = score.nats / score.num_hidden
    how = f"mean over hidden tokens: {_SHARE:.0%} of all but special ones, seed {seed}, in rows of {length}"
    return {
        "nats_per_hidden_token": (mean, how),
        "perplexity": (math.exp(mean) if mean < 700 else math.inf, "exp(nats per hidden token)"),
        "hidden_tokens": (score.num_hidden, "counted"),
        "tokens": (score.num_tokens, "counted, special ones included"),
        "documents": (score.num_documents, "counted"),
    }
