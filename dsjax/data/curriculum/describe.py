"""Description of difficulties for `dsjax analyze`: percentiles, a histogram, the easiest and the hardest rows."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from dsjax.data.rows.mixture import Rows
from dsjax.data.tokenizers.tokenizer import Tokenizer

PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
_BINS, _BAR, _COLUMNS, _WIDTH, _LINES = 16, 50, 100, 96, 3


def percentiles(values: Int64[np.ndarray, " N"]) -> dict[int, int]:
    """Find for each percentile the most difficult of the rows that a curriculum draws by it; 0 is the easiest row.

    Example:
        >>> percentiles(np.arange(1, 201))[50]
        100
    """
    ordered = np.sort(values)
    return {percent: int(ordered[max(0, len(values) * percent // 100 - 1)]) for percent in PERCENTILES}


def histogram(values: Int64[np.ndarray, " N"]) -> list[str]:
    """Lines of at most 100 columns: values from, to, rows, bar.

    Example:
        >>> print("\\n".join(histogram(np.array([1, 1, 1, 2, 5]))))
        1 -> 1  3  ##################################################
        2 -> 2  1  #################
        3 -> 3  0
        4 -> 4  0
        5 -> 5  1  #################
    """
    least, most = int(values.min()), int(values.max())
    # Whole numbers from edge to edge, each bin as wide as the next one: floats would not hold large values.
    width = -(-(most - least + 1) // _BINS)
    counts = np.bincount((values - least) // width)
    digits, rows = len(f"{most:,}"), len(f"{counts.max():,}")
    longest_bar = min(_BAR, _COLUMNS - 2 * digits - rows - len(" ->     "))
    lines = []
    for place, count in enumerate(counts.tolist()):
        begin = least + place * width
        bar = "#" * -(-longest_bar * count // int(counts.max()))
        end = min(most, begin + width - 1)
        lines.append(f"{begin:>{digits},} -> {end:>{digits},}  {count:>{rows},}  {bar}".rstrip())
    return lines


@dataclasses.dataclass(frozen=True)
class Example:
    """A row, how difficult it is and what it says."""

    row: int
    difficulty: int
    text: str
    """Printable, on one line."""

    def lines(self) -> list[str]:
        """The first lines of the text, of at most 100 columns."""
        cut = [self.text[at : at + _WIDTH] for at in range(0, len(self.text), _WIDTH)]
        if len(cut) > _LINES:
            cut = [*cut[: _LINES - 1], cut[_LINES - 1][: _WIDTH - 4] + " ..."]
        return ["    " + line for line in cut]


def examples(
    values: Int64[np.ndarray, " N"], rows: Rows, *, tokenizer: Tokenizer, count: int
) -> tuple[list[Example], list[Example]]:
    """The `count` easiest rows, easiest first, and the hardest, hardest first; no row is in both.

    Line ends and what a terminal could take for a command are written as Python does.
    """
    order = np.argsort(values, kind="stable")
    half = min(count, len(order) // 2)
    easy, hard = order[: min(count, len(order) - half)], order[::-1][:half]

    def shown(numbers: np.ndarray) -> list[Example]:
        if len(numbers) == 0:
            return []
        tokens, mask = rows.plain(numbers)
        return [
            Example(int(row), int(values[row]), printable(tokenizer.decode(some[real].tolist())))
            for row, some, real in zip(numbers, tokens, mask, strict=True)
        ]

    return shown(easy), shown(hard)


def printable(text: str) -> str:
    """On one line, nothing in it that a terminal does not print.

    Example:
        >>> printable("a\\n\\x1b[2Jb")
        'a\\\\n\\\\x1b[2Jb'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
