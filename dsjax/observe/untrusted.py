"""Reading of bytes from untrusted sources: text with or without a byte-order mark, and JSON.

Whatever is in them, there is one clear message, a ValueError. `where` names them in errors: a file, or a file and a
line.
"""

import json
import math
from typing import Any

MAX_DEPTH = 500
"""JSON nested deeper is refused: later code may recurse for each level."""
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def encoding_of(data: bytes) -> tuple[str, int]:
    """The encoding that a text's byte-order mark names, and the bytes of the mark; without one ("utf-8", 0).

    Example:
        >>> encoding_of("\\ufeffa".encode()), encoding_of(b"a"), encoding_of("a".encode("utf-16"))[1]
        (('utf-8', 3), ('utf-8', 0), 2)
    """
    return next(((name, len(mark)) for mark, name in _MARKS if data.startswith(mark)), ("utf-8", 0))


def decode_text(data: bytes, where: str) -> str:
    """Text in UTF-8, or in what its byte-order mark says; the mark is dropped.

    Raises:
        ValueError: it is in no such encoding.

    Example:
        >>> decode_text("é".encode("utf-16"), "here"), decode_text(b"\\xef\\xbb\\xbfa", "here")
        ('é', 'a')
        >>> decode_text(b"caf\\xe9", "menu.txt")
        Traceback (most recent call last):
        ...
        ValueError: menu.txt is not UTF-8: byte 0xe9 at 3 (unexpected end of data); convert it to UTF-8 first
    """
    encoding, mark = encoding_of(data)
    try:
        return data[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        at = mark + error.start
        raise ValueError(
            f"{where} is not {encoding.upper()}: byte 0x{data[at]:02x} at {at} ({error.reason}); convert it to UTF-8 "
            "first"
        ) from error


def split_lines(text: str) -> list[str]:
    """The lines of a text: they end with "\\n" or "\\r\\n" and nothing else. U+2028 or a form feed stays in its line.

    Example:
        >>> split_lines("a\\u2028b\\r\\nc\\x0cd\\n\\ne")
        ['a\\u2028b', 'c\\x0cd', '', 'e']
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def parse_json(data: bytes | str, where: str, *, lenient: bool = False, unique: bool = False) -> Any:
    """The value of a JSON text.

    Refused is also what Python's own reader lets pass or fails on: nesting deeper than `MAX_DEPTH`, a whole number of
    more than 4,300 digits, a key that is given twice with different values, and, unless `lenient`, numbers that are not
    finite and half of a surrogate pair.

    Args:
        data: the text; bytes may have a byte-order mark.
        where: what to call it in errors.
        unique: refuse a key that is given twice with one value, too.
        lenient: let NaN, Infinity, 1e400 and half of a surrogate pair pass: for rows of which little is used.

    Raises:
        ValueError: says where and what.

    Example:
        >>> parse_json(b'{"a": [1, 2.5]}', "here")
        {'a': [1, 2.5]}
        >>> parse_json('{"a": 1,\\n "a": 2}', "x.json")
        Traceback (most recent call last):
        ...
        ValueError: x.json is not JSON that can be read: the key 'a' is given twice, with different values
    """
    text = decode_text(data, where) if isinstance(data, bytes) else data
    try:
        value = (_UNIQUE if unique else _LENIENT if lenient else _STRICT).decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        if not lenient and "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{where} is not JSON: {error.msg} at {line}column {error.colno}{_rest(text)}") from error
    except RecursionError as error:
        raise ValueError(
            f"{where} is not JSON that can be read: it is nested too deeply, more than {MAX_DEPTH} levels"
        ) from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not JSON that can be read: a text in it has half of a surrogate pair") from error
    except ValueError as error:
        said = "a whole number of more than 4,300 digits" if "integer string" in str(error) else error
        raise ValueError(f"{where} is not JSON that can be read: {said}") from error
    return value


def _rest(text: str) -> str:
    return " (it is empty)" if not text.strip() else ""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            # By their text, for NaN is not equal to itself.
            if repr(found[key]) != repr(value):
                raise ValueError(f"the key {key!r:.60} is given twice, with different values")
    return found


def _all_different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {again!r:.60} is given twice")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number:.40} is not finite")
    return value


_LENIENT = json.JSONDecoder(object_pairs_hook=_pairs)
_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_finite, parse_constant=_finite)
_UNIQUE = json.JSONDecoder(object_pairs_hook=_all_different, parse_float=_finite, parse_constant=_finite)


def _depth(value: Any) -> int:
    """Levels of lists and objects inside one another, found without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
