"""The host as far as it decides speed: its processor, and in which pages the C library takes memory.

XLA:CPU allocates the temporaries of a program anew in each step. glibc maps them and gives them back, so that Linux
clears each page of 4 KiB at its first use: 240,000 faults in a step of a GPT of 5.8 M parameters, which take 0.3 of
two cores. With pages of 2 MiB there are 780 (experiments/pretraining_speed). Linux gives these to a program that asks
for them (the setting `madvise`, the usual one), and glibc 2.35 asks where the environment holds

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1

It reads that when a program starts, and never again: `restart_with_huge_pages` therefore starts the program once more.
(mallopt can keep freed memory in place of this. The same speed then takes up to twice the memory: what is allocated
first takes a part of the large piece that was freed, and the next step's does not fit any more.)
"""

import os
import sys
from pathlib import Path

SWITCH = "DSJAX_KEEP_MEMORY"
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
OLDEST_GLIBC = (2, 35)


def restart_with_huge_pages() -> None:
    """Start this program again so that it takes memory in pages of 2 MiB; call it first in a script, before JAX.

    The process keeps its number, arguments and files; what it has computed is lost. Nothing happens where the pages are
    large already, or would not become so: on another system than Linux with glibc 2.35, where Linux always or never
    gives them, where the environment sets it (DSJAX_KEEP_MEMORY=0 turns it off), and where Python runs
    no program: in a notebook or a shell. The command `dsjax` calls this itself.

    Example:
        >>> from unittest.mock import patch
        >>> with patch.dict(os.environ, DSJAX_KEEP_MEMORY="0"):
        ...     restart_with_huge_pages()  # returns at once
    """
    given = os.environ.get(TUNABLES, "")
    if os.environ.get(SWITCH) == "0" or HUGE_PAGES in given or not _can_help() or not _runs_a_program():
        return
    os.environ[TUNABLES] = f"{given}:{HUGE_PAGES}=1".lstrip(":")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def processor(*, root: Path = Path("/")) -> dict[str, str]:
    """Maker, name, and the numbers by which Linux tells processors of one name apart; {} where it does not.

    Args:
        root: where /proc is, for tests.
    """
    cpuinfo = root / "proc/cpuinfo"
    if not cpuinfo.exists():
        return {}
    first = cpuinfo.read_text().partition("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    names = {"vendor": "vendor_id", "name": "model name", "family": "cpu family", "model": "model"}
    return {ours: fields.get(theirs, "unknown") for ours, theirs in names.items()}


def memory_pages(*, root: Path = Path("/")) -> dict[str, str]:
    """The C library, when Linux gives large pages ('always', 'madvise', 'never'), and whether they are asked for.

    Args:
        root: where /sys is, for tests.

    Example:
        >>> sorted(memory_pages())
        ['huge_pages', 'libc', 'malloc']
    """
    malloc = {name: value for name, value in os.environ.items() if name == TUNABLES or name.startswith("MALLOC_")}
    version = _glibc()
    return {
        "libc": "not glibc" if version is None else f"glibc {'.'.join(map(str, version))}",
        "huge_pages": _huge_pages(root) or "unknown",
        "malloc": " ".join(f"{name}={value}" for name, value in sorted(malloc.items())) or "as it is",
    }


def _can_help() -> bool:
    version = _glibc()
    return version is not None and version >= OLDEST_GLIBC and _huge_pages(Path("/")) == "madvise"


def _runs_a_program() -> bool:
    """Whether Python was started with a script or a module: only then do its arguments start the same again."""
    return bool(sys.executable) and "__file__" in vars(sys.modules["__main__"]) and len(sys.orig_argv) > 1


def _glibc() -> tuple[int, ...] | None:
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return None
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):  # another C library
        return None
    return tuple(map(int, version.split("."))) if name == "glibc" else None


def _huge_pages(root: Path) -> str:
    """The word in brackets, as in `always [madvise] never`; '' where there is none."""
    enabled = root / "sys/kernel/mm/transparent_hugepage/enabled"
    return enabled.read_text().partition("[")[2].partition("]")[0] if enabled.exists() else ""
