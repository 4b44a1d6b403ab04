"""Stop strings, whatever pieces the text comes in."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.inference.text import StopStrings

TEXT = st.text(alphabet="abc", max_size=30)


def by_characters(text: str, strings: list[str]) -> tuple[str, bool]:
    """Read on until the text so far ends with a stop string, and cut the longest one off."""
    for end in range(len(text) + 1):
        if found := [string for string in strings if text[:end].endswith(string)]:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(text=TEXT, strings=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4), data=st.data())
def test_any_pieces_give_the_text_before_the_first_stop_string(text, strings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    borders = [0, *cuts, len(text)]
    cutter, shown = StopStrings(strings), []
    want, found = by_characters(text, strings)
    for start, end in itertools.pairwise(borders):
        shown.append(cutter.feed(text[start:end]))
        assert want.startswith("".join(shown))  # nothing of a stop string is ever shown
    shown.append(cutter.finish())
    assert ("".join(shown), cutter.found) == (want, found)


def test_nothing_is_held_back_for_longer_than_needed():
    cutter = StopStrings(["###"])
    assert [cutter.feed(piece) for piece in np.array(list("a#b##c"))] == ["a", "", "#b", "", "", "##c"]
