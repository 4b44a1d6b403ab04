"""Model FLOPs and their utilisation, by the formula of PaLM (arXiv 2204.02311, appendix B).

A token costs, forward and backward and without what rematerialisation repeats,

    6 N + 12 L H Q T        (here L = num_layers, H Q = model_dim, T = sequence_length)

FLOPs: 6 for each of the N parameters in a matrix product (a multiplication and an addition, once forward, twice
backward), and 12 for each of the H Q T products of queries with keys and weights with values of a layer. PaLM counts
all T keys for every query. A causal model needs half of them on average, which `causal=True` counts (6 L H Q T): that
gives a smaller, stricter utilisation. Say which one a figure uses.

Of F parameters that are frozen beside N trained ones (LoRA) no gradient is computed: 6 N + 4 F + 12 L H Q T.
"""


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
    attention = 12.0 * num_layers * model_dim * sequence_length
    return 6.0 * num_parameters + 4.0 * num_frozen + (attention / 2 if causal else attention)


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
