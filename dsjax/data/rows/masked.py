"""Masked language modelling (arXiv 1810.04805, 3.1): tokens are hidden, and a model that sees both sides guesses them.

Every token but the special ones is chosen with probability p by itself; of those chosen 80% become [MASK], 10% a token
drawn evenly from the vocabulary, special ones left out, and 10% stay. Which ones is a hash of (seed, draw, place): a
row that comes again in the next epoch is masked otherwise, and no state is kept. (The draws are counted over the whole
run, so their numbers stand for step, epoch and row.)

B rows, T tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Bool, Int64

from dsjax.data.config import DataConfig
from dsjax.data.rows.format import Batch
from dsjax.data.rows.packed import PackedFormat
from dsjax.data.rows.permute import fold, mix
from dsjax.data.tokenizers.tokenizer import Tokenizer

_TRAINING, _FIXED = 11, 12
_CHOICE, _KIND, _TOKEN = 1, 2, 3
_HIDDEN, _OTHER = 0.8, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedFormat(PackedFormat):
    """Rows of an encoder: as PackedFormat's, but targets and loss_mask are the hidden tokens.

    `segments` are there in any case, and tokens are what is left of the text.

    Attributes:
        masker: hides the tokens; None when only the arrays' shapes are asked for.
    """

    masker: "Masker | None" = None
    all_tokens: ClassVar[bool] = True

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer | None) -> Self:
        """The format that a config asks for."""
        masker = None if tokenizer is None else Masker.of(tokenizer, config)
        return dataclasses.replace(super().of(config, tokenizer), masker=masker)

    def training(self, batch: Batch, draws: Int64[np.ndarray, " B"]) -> Batch:
        """See `RowFormat`."""
        assert self.masker is not None
        return self.masker.training(batch, draws)

    def fixed(self, batch: Batch, rows: Int64[np.ndarray, " B"]) -> Batch:
        """See `RowFormat`."""
        assert self.masker is not None
        return self.masker.fixed(batch, rows)


class Masker:
    """Hides tokens of a batch.

    Example:
        >>> masker = Masker(mask_token=9, ordinary=np.array([False] + 8 * [True] + [False]), share=0.5, seed=0)
        >>> tokens = np.tile(np.arange(9), (2, 1))
        >>> batch = {"tokens": tokens, "targets": tokens, "loss_mask": tokens >= 0}
        >>> masked = masker.fixed(batch, np.arange(2))
        >>> bool((masked["tokens"] == tokens)[~masked["loss_mask"]].all()), masked["loss_mask"][:, 0].tolist()
        (True, [False, False])
    """

    def __init__(
        self, *, mask_token: int, ordinary: Bool[np.ndarray, " V"], share: float, seed: int, fixed_seed: int = 0
    ) -> None:
        """Hide a `share` of the tokens that are `ordinary` (no special ones).

        `seed` is that of the training rows, `fixed_seed` that of the validation rows.
        """
        self._mask_token, self._ordinary = mask_token, ordinary
        self._others = np.flatnonzero(ordinary).astype(np.int32)
        self._share, self._seed, self._fixed_seed = share, seed, fixed_seed

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: DataConfig) -> "Masker":
        """Make one for a tokenizer with a mask token, by the config's share and seed."""
        assert tokenizer.mask_token is not None, "the corpus was built without a mask token"
        ordinary = tokenizer.byte_lengths > 0
        return cls(
            mask_token=tokenizer.mask_token, ordinary=ordinary, share=config.mask_share, seed=config.shuffle_seed
        )

    def training(self, batch: Mapping[str, np.ndarray], draws: Int64[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Hide tokens of the rows that are drawn as number `draws` of the run."""
        return self._masked(batch, mix(draws, fold(_TRAINING, self._seed)))

    def fixed(self, batch: Mapping[str, np.ndarray], rows: Int64[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Hide tokens of validation rows: always the same, whatever the seed of training."""
        return self._masked(batch, mix(rows, fold(_FIXED, self._fixed_seed)))

    def _masked(self, batch: Mapping[str, np.ndarray], keys: np.ndarray) -> dict[str, np.ndarray]:
        """`batch` has every real token as its own target; `keys` uint64 [B]."""
        tokens = batch["tokens"]
        at = keys[:, None] + np.arange(tokens.shape[1], dtype=np.uint64)
        chosen = batch["loss_mask"] & self._ordinary[tokens] & (_uniform(at, _CHOICE) < self._share)
        kind = _uniform(at, _KIND)
        other = self._others[(mix(at, _TOKEN) % np.uint64(len(self._others))).astype(np.int64)]
        shown = np.where(kind < _HIDDEN, self._mask_token, np.where(kind < _HIDDEN + _OTHER, other, tokens))
        return {
            **batch,
            "tokens": np.where(chosen, shown, tokens).astype(np.int32),
            "targets": np.where(chosen, tokens, 0).astype(np.int32),
            "loss_mask": chosen,
        }


def _uniform(at: np.ndarray, which: int) -> np.ndarray:
    return mix(at, which) / 2.0**64
