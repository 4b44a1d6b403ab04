"""Bytes that others wrote: lines, encodings and JSON, whatever is in them."""

import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.observe.untrusted import MAX_DEPTH, decode_text, parse_json, split_lines

BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@given(st.text(st.sampled_from("ab" + BREAKS)))
def test_lines_end_where_a_line_feed_is(text):
    lines = split_lines(text)
    assert not any("\n" in line for line in lines)
    # As `wc -l` counts, and a last line that does not end.
    assert len(lines) == text.count("\n") + (text != "" and not text.endswith("\n"))
    assert "\n".join(lines) == re.sub("\r\n", "\n", text).removesuffix("\n").removesuffix("\r") or text.endswith("\r")
    assert [ord(c) for line in lines for c in line if c not in "\n\r"] == [ord(c) for c in text if c not in "\n\r"]


@given(st.text(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_a_byte_order_mark_says_the_encoding_and_is_dropped(text, encoding):
    # A mark of its own, or a zero that makes UTF-16's mark that of UTF-32.
    if (encoding, text[:1]) in (("utf-8", "\ufeff"), ("utf-16", "\0")):
        text = "x" + text
    assert decode_text(text.encode(encoding), "here") == text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values, st.booleans(), st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_what_json_writes_is_read(value, ascii_only, lenient, encoding):
    data = json.dumps(value, ensure_ascii=ascii_only).encode(encoding)
    assert parse_json(data, "here", lenient=lenient) == value


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]":,0123456789.eE-+\\udNaInfity\n ')).map(str.encode))
def test_whatever_else_it_is_there_is_one_message(data):
    for lenient in (False, True):
        try:
            parse_json(data, "some.json", lenient=lenient)
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith("some.json is not ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 20_000 + b"]" * 20_000, "x.json is not JSON that can be read: it is nested too deeply"),
        (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "nested too deeply"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deeply, more than 500 levels"),
        (b'{"n": ' + b"1" * (sys.get_int_max_str_digits() + 1) + b"}", "a whole number of more than 4,300 digits"),
        (b'{"n": NaN}', "the number NaN is not finite"),
        (b'{"n": -Infinity}', "the number -Infinity is not finite"),
        (b'{"n": 1e400}', "the number 1e400 is not finite"),
        (b'{"a": 1,\n "a": 2}', "the key 'a' is given twice, with different values"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "\xed\xa0\x80"}', r"x.json is not UTF-8: byte 0xed at 7"),
        (b'{"a": 1,\n "b": "caf\xe9"}', r"x.json is not UTF-8: byte 0xe9 at 19"),
        (b'{"a": 1,\n "b"', "x.json is not JSON: Expecting ':' delimiter at line 2, column 5"),
        (b"", "x.json is not JSON: Expecting value at column 1 .it is empty."),
        (b"{} {}", "x.json is not JSON: Extra data at column 4"),
    ],
)
def test_what_is_wrong_is_said(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(data, "x.json")
    assert type(caught.value) is ValueError and len(str(caught.value)) < 200


def test_rows_of_which_little_is_used_may_hold_what_settings_may_not():
    row = '{"a": NaN, "b": 1e400, "c": "\\ud800", "d": 1, "d": 1}'
    found = parse_json(row, "x.jsonl:1", lenient=True)
    assert found["a"] != found["a"] and found["b"] == float("inf") and found["c"] == "\ud800" and found["d"] == 1
    with pytest.raises(ValueError, match="the key 'd' is given twice"):
        parse_json('{"d": 1, "d": 1}', "x", unique=True)
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x") is not None
