"""Metrics of predicted classes: accuracy, F1 and the correlation of Matthews, from a table of counts.

n[t, p] rows have the class t and were taken for p; t_k and p_k are row and column sums, c = sum_k n[k, k], s all rows.

    accuracy   c / s
    F1 of k    2 n[k, k] / (t_k + p_k)
    Matthews   (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))     (Gorodkin 2004; of two classes
               the well-known correlation), 0 where the denominator is
"""

import math

import numpy as np
from jaxtyping import Int, Int64


def confusion(
    labels: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], *, num_classes: int
) -> Int64[np.ndarray, "C C"]:
    """The table of counts n[label, predicted].

    Example:
        >>> confusion(np.array([0, 1, 1]), np.array([0, 1, 0]), num_classes=2).tolist()
        [[1, 0], [1, 1]]
    """
    pairs = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(counts: Int64[np.ndarray, "C C"]) -> float:
    """The share of rows on the diagonal.

    Example:
        >>> accuracy(np.array([[1, 0], [1, 2]]))
        0.75
    """
    return int(np.trace(counts)) / int(counts.sum())


def f1(counts: Int64[np.ndarray, "C C"]) -> float:
    """F1 of class 1 if there are two classes, else the mean over the classes that occur or were predicted.

    A class of which no row was found has 0.

    Example:
        >>> f1(np.array([[1, 0], [1, 2]]))
        0.8
    """
    hits = np.diag(counts).astype(np.float64)
    either = (counts.sum(0) + counts.sum(1)).astype(np.float64)
    each = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
    return float(each[1]) if len(counts) == 2 else float(each[either > 0].mean())


def matthews(counts: Int64[np.ndarray, "C C"]) -> float:
    """The correlation of Matthews, from -1 to 1; 0 is what guessing has.

    Example:
        >>> round(matthews(np.array([[1, 0], [1, 2]])), 4)
        0.5774
    """
    # Python's integers: the products of counts outgrow 64 bits.
    true, predicted = [int(n) for n in counts.sum(1)], [int(n) for n in counts.sum(0)]
    right, rows = int(np.trace(counts)), int(counts.sum())
    covariance = right * rows - sum(t * p for t, p in zip(true, predicted, strict=True))
    spread = (rows**2 - sum(p * p for p in predicted)) * (rows**2 - sum(t * t for t in true))
    return covariance / math.sqrt(spread) if spread else 0.0
