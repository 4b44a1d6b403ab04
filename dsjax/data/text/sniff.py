"""Compression and encoding of a file by its first bytes, since its name may say anything; and its bytes decompressed.

gzip, bzip2, xz and Zstandard are read. What is known to be no text, such as an archive or a picture, is refused with
what to do about it, for no setting makes text of it.
"""

import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from dsjax.observe.untrusted import encoding_of

MAX_DECOMPRESSED = 1 << 28
"""A compressed document, or a line of a compressed file, of more bytes is refused: a small file may hold any number."""
_HEAD = 4096
_FEW = 0.1
_MOST_MEMORY = 1 << 27  # of xz and Zstandard; their highest ordinary levels, 9 and 19, take 65 and 8 MB

Compression = Literal["gzip", "bzip2", "xz", "Zstandard"]
_COMPRESSED: tuple[tuple[bytes, Compression], ...] = (
    (rb"\x1f\x8b\x08", "gzip"),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "bzip2"),
    (rb"\xfd7zXZ\x00", "xz"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "Zstandard"),
)
_UNPACK = "unpack it and name its files"
_EXTRACT = "extract its text first"
_REFUSED = (
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a ZIP archive (or a document in one, such as .docx)", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "compressed with LZ4, which is not read here", "decompress it first: lz4 -d FILE"),
    (rb"\x5d\x00\x00[\x00-\xff]{2}[\x00-\xff]{3}\xff", "in the old LZMA format", "decompress it first: unlzma FILE"),
    (rb"[\x00-\xff]{257}ustar(?:\x00|  \x00)", "a tar archive", _UNPACK),
    (rb"PAR1[\x00-\xff]{0,60}\x00", "a Parquet file", "read it by a source of kind parquet"),
    (rb"ARROW1\x00\x00", "an Arrow file", "write its column of text as JSON lines"),
    (rb"%PDF-[12]\.", "a PDF document", _EXTRACT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office", _EXTRACT),
    (rb"SQLite format 3\x00", "an SQLite database", _EXTRACT),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXTRACT),
    (rb"GGUF[\x00-\x09]\x00\x00\x00", "a GGUF model", "it holds weights and no text"),
    (rb"\x93NUMPY", "a NumPy array", "it holds numbers and no text"),
    (rb"\x80[\x02-\x05][\x00-\xff]{1,40}\.?", "a pickle", "it is not read, since it can run any code"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF[\x00-\xff]{4}WEBP", "a picture", "it holds no text"),
    (
        rb"RIFF[\x00-\xff]{4}(?:WAVE|AVI )|OggS\x00|fLaC\x00|ID3[\x02-\x04]|\x00{3}.ftyp",
        "sound or video",
        "it holds no text",
    ),
    (rb"\x7fELF|MZ[\x00-\xff]{1,60}\x00|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe", "a program", "it holds no text"),
)


class NotText(ValueError):
    """A file that holds no text, whatever is done with bytes that are not UTF-8."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file's bytes from its beginning, decompressed."""

    stream: BinaryIO
    compression: Compression | None
    encoding: str
    """Python's name of it; what a byte-order mark says, else UTF-8."""


def compression_of(head: bytes) -> Compression | None:
    """Find the compression of a file that begins with these bytes; None if there is none.

    Example:
        >>> compression_of(gzip.compress(b"text")), compression_of(b"text")
        ('gzip', None)
    """
    return next((name for magic, name in _COMPRESSED if re.match(magic, head)), None)


def is_plain(path: Path) -> bool:
    """Whether a file's lines can be found in its bytes: it is neither compressed nor in UTF-16 or UTF-32."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return compression_of(head) is None and encoding_of(head)[0] == "utf-8"


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[Opened]:
    """Open a file to be read from its beginning; only what is asked of the stream is decompressed.

    Raises:
        ValueError: a damaged compressed file, one that this Python cannot decompress, or (NotText) no text at all.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = path.write_bytes(gzip.compress("é".encode("utf-16")))
        >>> with open_bytes(path) as opened:
        ...     opened.compression, opened.encoding, opened.stream.read()[2:].decode("utf-16-le")
        ('gzip', 'utf-16-le', 'é')
    """
    try:
        with path.open("rb") as file:
            compression = compression_of(file.read(_HEAD))
            file.seek(0)
            if compression is None:
                head = file.read(_HEAD)
                file.seek(0)
                yield Opened(file, None, _checked(head, path, None))
                return
            with _decompressed(file, compression, path) as stream:
                head = stream.read(_HEAD)
            encoding = _checked(head, path, compression)
            file.seek(0)
            with _decompressed(file, compression, path) as stream:
                yield Opened(stream, compression, encoding)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, *_zstandard_errors()) as error:
        raise ValueError(f"{path}: damaged compressed file ({error}); make it anew or leave it out") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged compressed file ({error}); make it anew or leave it out") from error


def read_bounded(opened: Opened, path: Path) -> bytes:
    """All of a file.

    Raises:
        ValueError: it is compressed, and there is more than `MAX_DECOMPRESSED`.
    """
    if opened.compression is None:
        return opened.stream.read()
    data = bytearray()
    while block := opened.stream.read(1 << 20):
        data += block
        check_size(len(data), path)
    return bytes(data)


def check_size(num_bytes: int, path: Path) -> None:
    """Refuse what has become too large while it was decompressed.

    Raises:
        ValueError: names the file.
    """
    if num_bytes > MAX_DECOMPRESSED:
        raise ValueError(
            f"{path} is compressed and holds a document or a line of more than {MAX_DECOMPRESSED:,} bytes; if that is "
            "meant, decompress it first"
        )


def not_text(data: bytes) -> str:
    """Why bytes without a byte-order mark are no text, although they may be valid UTF-8; '' if they may be one.

    Example:
        >>> not_text("Straße".encode()), not_text("text".encode("utf-16-le"))
        ('', 'it looks like UTF-16 without a byte-order mark: convert it: iconv -f UTF-16LE -t UTF-8 FILE')
        >>> not_text(bytes(8) + b"text")
        '8 of its first 12 bytes are 0: it is no text; leave it out'
    """
    head = data[:_HEAD]
    zeros = head.count(0)
    for parity, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if len(head) >= 8 and zeros == head[parity::2].count(0) and zeros > 0.8 * (len(head) // 2):
            return f"it looks like UTF-16 without a byte-order mark: convert it: iconv -f {name} -t UTF-8 FILE"
    if zeros > _FEW * len(head):
        return f"{zeros:,} of its first {len(head):,} bytes are 0: it is no text; leave it out"
    return ""


def mostly_utf8(data: bytes) -> bool:
    """Whether at most a tenth of the first bytes are not UTF-8: a text with a few damaged characters.

    Example:
        >>> mostly_utf8(b"caf\\xe9 au lait"), mostly_utf8("да".encode("cp1251"))
        (True, False)
    """
    head = data[:_HEAD]
    wrong = len(head) - len(head.decode("utf-8", "ignore").encode())
    # A character that is cut off at the end of the head is no fault.
    return wrong - (3 if len(data) > _HEAD else 0) <= _FEW * len(head)


def _checked(head: bytes, path: Path, compression: Compression | None) -> str:
    """The encoding of a text that begins so.

    Raises:
        NotText: it is known to be something else.
    """
    inside = f"compressed with {compression}, and inside " if compression else ""
    encoding, mark = encoding_of(head)
    if compression and (again := compression_of(head)):
        raise NotText(f"{path} is {inside}compressed again with {again}: decompress it first")
    if mark:
        return encoding
    for magic, what, advice in _REFUSED:
        if re.match(magic, head):
            raise NotText(f"{path} is {inside}{what}, no text: {advice}")
    return encoding


def _decompressed(file: BinaryIO, compression: Compression, path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    if compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if compression == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if compression == "xz":
        frame = functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)
        return io.BufferedReader(_FrameReader(file, frame), 1 << 17)
    return _zstandard(file, path)


def _zstandard(file: BinaryIO, path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdFile(file)
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(
            f"{path} is compressed with Zstandard, for which Python before 3.14 needs a package: "
            "pip install 'dsjax[zstd]', or decompress it first: zstd -d FILE"
        ) from error
    frame = zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY).decompressobj
    return io.BufferedReader(_FrameReader(file, frame), 1 << 17)


class _FrameReader(io.RawIOBase):
    """Frames one after another, each decompressed by an object of its own.

    The readers of the libraries lack something: that of xz has no bound for its memory, which a file's first bytes may
    put at 4 GB, and that of `zstandard` takes a file that is cut off for a whole one.
    """

    def __init__(self, file: BinaryIO, new_frame: Callable[[], Any]) -> None:
        self._file, self._new_frame = file, new_frame
        self._frame: Any = None
        self._unused, self._held = b"", memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill some of `buffer`; 0 at the end."""
        while not self._held:
            # 1 KiB at most becomes 32 MiB: a block of 128 KiB takes 4 bytes of Zstandard.
            data = self._unused or self._file.read(1 << 10)
            if self._frame is None and data[:1] == b"\0":  # xz allows zeros between frames
                self._unused = data.lstrip(b"\0")
                continue
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            if self._frame is None:
                self._frame = self._new_frame()
            self._held = memoryview(self._frame.decompress(data))
            self._unused = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _zstandard_errors() -> tuple[type[Exception], ...]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return (zstd.ZstdError,)
    # Imported by nobody else: without it no such error was raised.
    module = sys.modules.get("zstandard")
    return () if module is None else (module.ZstdError,)
