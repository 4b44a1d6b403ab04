"""The row formats that there are: a task of the data -> its format."""

from collections.abc import Callable

from dsjax.data.config import DataConfig, DataTask
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


def task_of(config: DataConfig) -> DataTask:
    """The task of the data: a language model's where `from_model` leaves it open.

    Raises:
        ValueError: a task that is not there.

    Example:
        >>> task_of(DataConfig()), task_of(DataConfig(task="masked"))
        ('language_model', 'masked')
    """
    task = "language_model" if config.task == "from_model" else config.task
    if task not in FORMATS:
        raise ValueError(f"data.task is {task}; there are from_model, {', '.join(FORMATS)}")
    return task


def row_format(config: DataConfig, tokenizer: Tokenizer | None = None) -> RowFormat:
    """The format of a run's rows.

    Args:
        config: of the data.
        tokenizer: of the corpus; None when only the arrays' shapes are asked for.

    Raises:
        ValueError: a task that is not there.

    Example:
        >>> spec = row_format(DataConfig(sequence_length=8)).spec((2, 1, 4))
        >>> sorted(spec), spec["tokens"].shape
        (['loss_mask', 'positions', 'segments', 'targets', 'tokens'], (2, 1, 4, 8))
    """
    return FORMATS[task_of(config)](config, tokenizer)
