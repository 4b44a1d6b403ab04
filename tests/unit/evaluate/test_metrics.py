"""Accuracy, F1 and Matthews: against definitions written out pair by pair, and published examples."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.evaluate.metrics import accuracy, confusion, f1, matthews


def counts_of(labels, predicted, num_classes):
    return confusion(np.array(labels), np.array(predicted), num_classes=num_classes)


def pearson(labels, predicted, num_classes):
    """The correlation of Gorodkin as it is defined: covariances of the one-hot matrices."""
    x, y = np.eye(num_classes)[list(labels)], np.eye(num_classes)[list(predicted)]
    cov = lambda a, b: float(((a - a.mean(0)) * (b - b.mean(0))).sum())
    spread = cov(x, x) * cov(y, y)
    return cov(x, y) / math.sqrt(spread) if spread > 1e-12 else 0.0


@settings(deadline=None)
@given(st.integers(2, 5), st.data())
def test_against_the_definitions(num_classes, data):
    pairs = st.tuples(*[st.integers(0, num_classes - 1)] * 2)
    labels, predicted = zip(*data.draw(st.lists(pairs, min_size=1, max_size=40)), strict=True)
    counts = counts_of(labels, predicted, num_classes)
    both = list(zip(labels, predicted, strict=True))
    assert accuracy(counts) == sum(t == p for t, p in both) / len(both)
    each = {}
    for k in set(labels) | set(predicted):
        hits = sum(t == p == k for t, p in both)
        precision = hits / max(1, predicted.count(k))
        recall = hits / max(1, labels.count(k))
        each[k] = 2 * precision * recall / (precision + recall) if hits else 0.0
    want = each.get(1, 0.0) if num_classes == 2 else sum(each.values()) / len(each)
    assert math.isclose(f1(counts), want, rel_tol=1e-12, abs_tol=1e-15)
    assert math.isclose(matthews(counts), pearson(labels, predicted, num_classes), rel_tol=1e-9, abs_tol=1e-9)


def test_published_examples():
    # scikit-learn's documentation of matthews_corrcoef and of f1_score (macro).
    assert math.isclose(matthews(counts_of([1, 1, 1, 0], [1, 0, 1, 1], 2)), -1 / 3)
    assert round(f1(counts_of([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 3)), 2) == 0.27
    # Wikipedia, "Phi coefficient": 12 pictures, 6 of 8 cats and 3 of 4 dogs are found.
    cats = [1] * 8 + [0] * 4, [0] * 2 + [1] * 6 + [1] + [0] * 3
    assert round(matthews(counts_of(*cats, 2)), 3) == 0.478


def test_large_counts_do_not_overflow():
    counts = np.array([[2**40, 2**38], [2**38, 2**40]])
    assert math.isclose(matthews(counts), 0.6) and math.isclose(accuracy(counts), 0.8)
