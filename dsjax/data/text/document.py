"""Documents, made of bytes or of the values of a row."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from dsjax.data.text.sniff import mostly_utf8

Undecodable = Literal["error", "replace", "skip"]
"""The treatment of bytes that are not UTF-8."""
MAX_LABELS = 1 << 16
"""More classes than this are taken for a mistake, such as a number that is no label."""
_GO_ON = "set data.undecodable (--undecodable) to 'replace' or 'skip' to go on"
_CONVERT = "it is in another encoding (convert it: iconv -f ENCODING -t UTF-8 FILE) or no text at all (leave it out)"


@dataclasses.dataclass(frozen=True)
class Document:
    """One document; `name` says where it is, such as `novels/emma.txt` or `pages.jsonl:17`."""

    name: str
    text: str
    pair: str | None = None
    """The second text, of sources with `text_pair`."""
    label: int | str | None = None
    """The label, of sources with `label`."""


def decode(data: bytes, encoding: str, where: str, undecodable: Undecodable) -> str | None:
    """Decode a text; None if it is to be left out.

    Raises:
        ValueError: they are not in the encoding, and `undecodable` is "error"; names the byte.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if undecodable == "replace":
            return data.decode(encoding, "replace")
        if undecodable == "skip":
            return None
        byte = f"0x{data[error.start]:02x} at byte {error.start}"
        # Text that is hardly UTF-8 would be trained on as little but U+FFFD.
        advice = _GO_ON if encoding != "utf-8" or mostly_utf8(data) else _CONVERT
        raise ValueError(f"{where}: {byte} is not {encoding.upper()} ({error.reason}); {advice}") from error


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a JSON object, or columns of a table, that make a document.

    Example:
        >>> Keys("field", "text", label="stars").settings
        {'field': 'text', 'label': 'stars'}
    """

    setting: str
    """The source's setting that names the key of the text."""
    text: str
    pair: str = ""
    """Key of the second text; '' for none."""
    label: str = ""
    """Key of the label; '' for none."""

    @property
    def settings(self) -> dict[str, str]:
        """Setting of the source -> key."""
        named = {self.setting: self.text, "text_pair": self.pair, "label": self.label}
        return {setting: key for setting, key in named.items() if key or setting == self.setting}

    def document(
        self, name: str, values: Mapping[str, object], where: str, undecodable: Undecodable
    ) -> Document | None:
        """Make a document of some values; None if it is to be left out."""
        text = checked(values[self.text], f"{where}{self.text!r}", undecodable)
        pair = checked(values[self.pair], f"{where}{self.pair!r}", undecodable) if self.pair else None
        if text is None or (self.pair and pair is None):
            return None
        if not self.label:
            return Document(name, text, pair)
        label = self._label(values[self.label], where, undecodable)
        return None if label is None else Document(name, text, pair, label)

    def _label(self, value: object, where: str, undecodable: Undecodable) -> int | str | None:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_LABELS:
            return value
        if isinstance(value, str | bytes) and value:
            return checked(value, f"{where}{self.label!r}", undecodable)
        raise ValueError(
            f"{where}{self.label!r} must be a label: a whole number from 0 to {MAX_LABELS - 1} or a string; got "
            f"{value!r:.60}"
        )


def checked(value: object, where: str, undecodable: Undecodable) -> str | None:
    """Return `value` if it is text with a UTF-8 form; None if it is to be left out.

    JSON can spell half of a surrogate pair, Parquet hold any bytes.

    Raises:
        ValueError: it is no such text, and `undecodable` does not help.
    """
    if isinstance(value, bytes):
        return decode(value, "utf-8", where, undecodable)
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if undecodable == "replace":
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if undecodable == "skip":
            return None
        raise ValueError(f"{where} has half of a surrogate pair at character {error.start}; {_GO_ON}") from error
    return value
