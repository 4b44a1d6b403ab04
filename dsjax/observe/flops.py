"""Model FLOPs and their utilisation, by the formula of PaLM (arXiv 2204.02311, appendix B).

A token costs, forward and backward and without what rematerialisation repeats,

    6 N + 12 L H Q T        (here L = num_layers, H Q = model_dim, T = sequence_length)

FLOPs: 6 for each of the N parameters in a matrix product (a multiplication and an addition, once forward, twice
backward), and 12 for each of the H Q T products of queries with keys and weights with values of a layer. PaLM counts
all T keys for every query. A causal model needs half of them on average, which `causal=True` counts (6 L H Q T): that
gives a smaller, stricter utilisation. Say which one a figure uses.

Of F parameters that are frozen beside N trained ones (LoRA) no gradient is computed: 6 N + 4 F + 12 L H Q T.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int64

Count = int | Int64[np.ndarray, "*steps"]
"""Of one step, or of each of many."""


def model_flops_per_token(
    num_parameters: int,
    *,
    num_layers: int,
    model_dim: int,
    sequence_length: int,
    num_frozen: int = 0,
    causal: bool = False,
) -> float:
    """FLOPs of one training step per token.

    Args:
        num_parameters: N, those in matrix products: without the tables of token and position embeddings, but with the
            output projection, also where it shares the token table.
        num_layers: L.
        model_dim: width of all heads together, H Q.
        sequence_length: T, keys that a query can see.
        num_frozen: F, parameters in matrix products that are not trained and not among the N.
        causal: count only the keys up to the query, T/2 on average.

    Example:
        >>> model_flops_per_token(1_000_000, num_layers=4, model_dim=128, sequence_length=256)
        7572864.0
    """
    matrices = Matrices(0, num_parameters + 2 / 3 * num_frozen, num_layers, attention_dim=model_dim)
    row = training_flops(matrices, rows=1, length=sequence_length, kept=sequence_length, causal=causal)
    return float(row) / sequence_length


def mfu(tokens_per_second: float, flops_per_token: float, *, peak_flops: float, num_devices: int = 1) -> float:
    """Model FLOPs utilisation: FLOPs that the model needs per second over those that the devices could do.

    Args:
        tokens_per_second: of the whole run, all devices together.
        flops_per_token: from model_flops_per_token.
        peak_flops: FLOP/s of one device at the precision used, e.g. 989e12.
        num_devices: devices of the run.

    Raises:
        ValueError: a peak or a number of devices that is not positive.

    Example:
        >>> mfu(60_000, 8.5e9, peak_flops=989e12)
        0.5156723963599595
    """
    if peak_flops <= 0 or num_devices < 1:
        raise ValueError(f"peak_flops and num_devices must be positive; got {peak_flops} and {num_devices}")
    return tokens_per_second * flops_per_token / (peak_flops * num_devices)


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The matrix products of a model.

    Attributes:
        layer_parameters: P, of one layer. Frozen ones count 2/3 here and below: they have no gradient.
        other_parameters: those outside the layers, such as the output projection.
        num_layers: L.
        attention_dim: width of all heads together, H Q.
        dropping_layers: L_n, layers that may see fewer tokens.
    """

    layer_parameters: float
    other_parameters: float
    num_layers: int
    attention_dim: int
    dropping_layers: int = 0


def training_flops(
    matrices: Matrices, *, rows: Count, length: Count, kept: Count, causal: bool = False
) -> Float64[np.ndarray, "*steps"]:
    """FLOPs of a training step in which some layers see fewer tokens (random-LTD, arXiv 2211.11586).

    A layer costs f(s) = 2 P s + 4 H Q s^2 for a row of s tokens in the forward pass, with P its parameters in matrix
    products (12 D^2 in GPT: f(s) = 24 D^2 s + 4 D s^2), and twice that in the backward pass; the L_n dropping layers
    see min(kept, length) tokens, all else sees `length`. Whatever depends on the step may be an array over steps.

    Args:
        matrices: of the model.
        rows: of the global batch.
        length: real positions of a row.
        kept: tokens that the dropping layers see of them.
        causal: count only the keys up to the query, half of them.

    Example:
        >>> model = Matrices(12 * 64**2, 0, num_layers=4, attention_dim=64, dropping_layers=2)
        >>> steps = training_flops(model, rows=8, length=128, kept=np.array([64, 128]))
        >>> (1 - steps / training_flops(model, rows=8, length=128, kept=128)).round(4).tolist()
        [0.2812, 0.0]
    """
    length = np.asarray(length, np.float64)
    keys = 0.5 if causal else 1.0
    layer = lambda tokens: 2.0 * matrices.layer_parameters * tokens + 4.0 * matrices.attention_dim * keys * tokens**2
    dropping = matrices.dropping_layers
    layers = (matrices.num_layers - dropping) * layer(length) + dropping * layer(np.minimum(kept, length))
    return np.asarray(3.0 * np.asarray(rows) * (layers + 2.0 * matrices.other_parameters * length))


def layer_tokens(
    *, rows: Count, length: Count, kept: Count, num_layers: int, dropping_layers: int
) -> Int64[np.ndarray, "*steps"]:
    """Tokens times layers that see them, in a step or in an array of steps: rows (s (L - L_n) + k L_n).

    Example:
        >>> int(layer_tokens(rows=2, length=128, kept=64, num_layers=4, dropping_layers=2))
        768
    """
    rows, length, kept = (np.asarray(count, np.int64) for count in (rows, length, kept))
    return np.asarray(rows * (length * (num_layers - dropping_layers) + np.minimum(kept, length) * dropping_layers))
