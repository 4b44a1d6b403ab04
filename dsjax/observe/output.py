"""Text for a console that may not know all of its characters: printing must not end a long run."""

import io
import sys


def printable(text: str, encoding: str) -> str:
    """The text with escapes for what an encoding has no character for.

    Example:
        >>> print(printable("naïve ✓", "ascii"), printable("naïve ✓", "utf-8"))
        na\\xefve \\u2713 naïve ✓
    """
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escape_unprintable() -> None:
    """Let this process's standard output and error write escapes for what they have no character for.

    For commands, whose streams are their own; a stream that is set to do something else than to fail is left alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
