"""The row formats that there are: a task of the data -> its format."""

from collections.abc import Callable

from dsjax.data.config import DataConfig
from dsjax.data.rows.format import RowFormat
from dsjax.data.rows.labels import LabelledFormat
from dsjax.data.rows.masked import MaskedFormat
from dsjax.data.rows.packed import PackedFormat
from dsjax.data.tokenizers.tokenizer import Tokenizer

FORMATS: dict[str, Callable[[DataConfig, Tokenizer | None], RowFormat]] = {
    "language_model": PackedFormat.of,
    "masked": MaskedFormat.of,
    "classification": LabelledFormat.of,
}


def row_format(config: DataConfig, tokenizer: Tokenizer | None = None) -> RowFormat:
    """The format of a run's rows.

    Args:
        config: of the data; `from_model` means rows of a language model.
        tokenizer: of the corpus; None when only the arrays' shapes are asked for.

    Example:
        >>> spec = row_format(DataConfig(sequence_length=8)).spec((2, 1, 4))
        >>> sorted(spec), spec["tokens"].shape
        (['loss_mask', 'positions', 'segments', 'targets', 'tokens'], (2, 1, 4, 8))
    """
    return FORMATS["language_model" if config.task == "from_model" else config.task](config, tokenizer)
