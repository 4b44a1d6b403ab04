"""Counts of what is skipped: files of a searched folder, and documents. Nothing is left out without a word."""

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_MOST_NAMED = 8


def ending_of(name: str) -> str:
    """Return the ending of a file's name, with that of a compression; "" if it has none.

    Example:
        >>> ending_of("a.jsonl.zst"), ending_of("b.TXT"), ending_of("README")
        ('.jsonl.zst', '.TXT', '')
    """
    stem, ending = os.path.splitext(name)
    return os.path.splitext(stem)[1] + ending if ending in _COMPRESSIONS else ending


def count_skipped(root: Path, read: Collection[Path]) -> Counter[str]:
    """Count by ending the files of a folder that are not `read`.

    Empty ones, and what begins with a dot, count as such; a folder that begins with a dot, or is a link, counts as one.
    """
    counts: Counter[str] = Counter()
    known = frozenset(map(os.fspath, read))
    for folder, folders, files in os.walk(root):
        for name in list(folders):
            hidden = name.startswith(".")
            if hidden or os.path.islink(os.path.join(folder, name)):
                folders.remove(name)
                counts["folder that begins with a dot" if hidden else "link to a folder"] += 1
        for name in files:
            path = os.path.join(folder, name)
            if path in known:
                continue
            if name.startswith("."):
                counts["file that begins with a dot"] += 1
            elif os.path.isfile(path):  # no socket, and no link to nothing
                empty = not os.path.getsize(path)
                counts["empty file" if empty else ending_of(name) or "file without an ending"] += 1
    return counts


def in_words(counts: Mapping[str, int]) -> str:
    """Write counts by ending, the largest first.

    Example:
        >>> in_words({".md": 1, ".txt.zst": 2})
        '2 .txt.zst, 1 .md'
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count:,} {name}" for name, count in ordered[:_MOST_NAMED]]
    rest = sum(count for _, count in ordered[_MOST_NAMED:])
    return ", ".join(named + ([f"{rest:,} other" + ("s" if rest > 1 else "")] if rest else []))


@dataclasses.dataclass
class Tally:
    """Counts of one source, made while its parts are read."""

    empty: int = 0
    """Documents without text, which are left out; nothing between two separators is no document."""
    undecodable: int = 0
    """Documents, or files, that are left out as `undecodable` says."""
    separators: int = 0
    """Occurrences of a text source's separator."""

    def remarks(self, root: Path) -> list[str]:
        """Write a line for each count that a user may not expect."""
        lines = []
        if self.empty:
            lines.append(f"{root}: left out {self.empty:,} document{'s' * (self.empty > 1)} without text")
        if self.undecodable:
            what = "of its documents or files, which are no UTF-8 text (undecodable: skip)"
            lines.append(f"{root}: left out {self.undecodable:,} {what}")
        return lines
