"""The counted baselines against a dictionary of counts, and against what is known of made-up text."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.corpus import ngram
from dsjax.data.corpus.ngram import baseline
from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.packed import PackedFormat
from dsjax.data.rows.pipeline import FixedBatches


def store_of(documents):
    tokens = np.concatenate([np.asarray(document, np.uint16) for document in documents])
    return TokenStore(tokens=tokens, offsets=np.cumsum([0, *map(len, documents)]), hash="x" * 64)


def pairs_of(documents):
    return [pair for document in documents for pair in itertools.pairwise(document)]


documents_of = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=30), min_size=2, max_size=12)


@settings(deadline=None, max_examples=40)
@given(documents_of, documents_of, st.integers(1, 50))
def test_agrees_with_a_dictionary_of_counts(train, validation, chunk):
    lengths = np.array([3, 1, 4, 1, 5, 9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "_CHUNK", chunk)
        try:
            result = baseline([store_of(train)], [store_of(validation)], vocab_size=6, byte_lengths=lengths)
        except ValueError as error:
            assert "too few" in str(error)
            return
    pairs, evaluated = pairs_of(train), pairs_of(validation)
    both, inputs, targets = (collections.Counter(x) for x in (pairs, [a for a, _ in pairs], [b for _, b in pairs]))
    assert math.isclose(sum(result.bigram_weights), 1) and math.isclose(sum(result.unigram_weights), 1)
    w2, w1, w0 = result.bigram_weights
    v1, v0 = result.unigram_weights
    bigram = unigram = 0.0
    for a, b in evaluated:
        single = targets[b] / len(pairs)
        bigram -= math.log(w2 * (both[a, b] / inputs[a] if inputs[a] else single) + w1 * single + w0 / 6)
        unigram -= math.log(v1 * single + v0 / 6)
    size = sum(int(lengths[b]) for _, b in evaluated)
    assert result.num_targets == len(evaluated) and result.num_bytes == size
    assert result.num_training_pairs == len(pairs)
    # float64 sums in another order
    np.testing.assert_allclose(result.bigram_nats, bigram / len(evaluated), rtol=1e-12)
    np.testing.assert_allclose(result.unigram_nats, unigram / len(evaluated), rtol=1e-12)
    np.testing.assert_allclose(result.bigram_nats_per_byte, bigram / size, rtol=1e-12)
    np.testing.assert_allclose(result.unigram_nats_per_byte, unigram / size, rtol=1e-12)


def test_finds_the_entropy_of_a_markov_chain():
    random = np.random.default_rng(0)
    moves = random.dirichlet(np.full(8, 0.4), size=8)
    chain = [0]
    for draw in random.random(60_000):
        chain.append(min(7, int(np.searchsorted(np.cumsum(moves[chain[-1]]), draw))))
    result = baseline(
        [store_of([chain[:50_000]])], [store_of([chain[50_000:]])], vocab_size=8, byte_lengths=np.ones(8, int)
    )
    stationary = np.linalg.matrix_power(moves, 200)[0]
    entropy = -(stationary[:, None] * moves * np.log(np.maximum(moves, 1e-300))).sum()
    alone = -(stationary * np.log(stationary)).sum()
    # 10,000 targets: the standard error of either mean is about 0.01.
    assert abs(result.bigram_nats - entropy) < 0.04 and abs(result.unigram_nats - alone) < 0.04
    assert result.bigram_weights[0] > 0.97


def test_evaluates_exactly_the_masked_targets_of_batches():
    random = np.random.default_rng(1)
    documents = [[*random.integers(1, 9, 12).tolist(), 0] for _ in range(60)]
    train, validation = store_of(documents[:40]), store_of(documents[40:])
    rows = Rows([validation], PackedFormat(sequence_length=10))
    options = {"vocab_size": 9, "byte_lengths": np.ones(9, int)}
    whole = baseline([train], [validation], **options)
    assert baseline([train], FixedBatches(rows, batch_size=7), **options).bigram_nats == pytest.approx(
        whole.bigram_nats
    )
    some = baseline([train], FixedBatches(rows, batch_size=7, num_rows=9), **options)
    batches = list(FixedBatches(rows, batch_size=7, num_rows=9))
    assert some.num_targets == sum(int(batch["loss_mask"].sum()) for batch in batches) < whole.num_targets


def test_documents_that_run_on():
    documents = [[1, 2, 0]] * 50
    options = {"vocab_size": 3, "byte_lengths": np.ones(3, int)}
    apart = baseline([store_of(documents)], [store_of(documents)], **options)
    joined = baseline([store_of(documents)], [store_of(documents)], **options, across_documents=True)
    assert (apart.num_training_pairs, joined.num_training_pairs) == (100, 149)
    assert joined.num_targets == 149


def test_nothing_to_count_or_evaluate():
    options = {"vocab_size": 3, "byte_lengths": np.ones(3, int)}
    with pytest.raises(ValueError, match="no target"):
        baseline([store_of([[1, 2]])], [], **options)
    with pytest.raises(ValueError, match="too few"):
        baseline([store_of([[1]])], [store_of([[1, 2]])], **options)
