"""metrics.jsonl after a resume: each step once."""

from pathlib import Path

from dsjax.checkpoint.manifest import back_up, write_atomically
from dsjax.observe.untrusted import parse_json


def truncate_metrics(path: Path, last_step: int) -> int:
    """Cuts the rows that the resumed run will write again, and a last line that a crash has torn.

    The whole old file stays beside it as `<name>.bak` (`.bak.1`, `.bak.2`, ... if that exists). A file with nothing to
    cut is not touched; neither is a missing one. Rows without a "step" stay.

    Args:
        path: one JSON object per line.
        last_step: the checkpoint's step; rows with a larger "step" are cut.

    Returns:
        Number of lines cut.

    Raises:
        ValueError: a line other than the last is not a JSON object; the file is left as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1}\\n{"step": 2}\\n{"step": 3}\\n{"st')
        >>> truncate_metrics(path, 1)
        3
        >>> path.read_text(), sorted(file.name for file in path.parent.iterdir())
        ('{"step": 1}\\n', ['metrics.jsonl', 'metrics.jsonl.bak'])
    """
    if not path.exists():
        return 0
    old = path.read_bytes()
    lines = old.removesuffix(b"\n").split(b"\n") if old else []
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not a JSON object: {line[:80]!r}; mend or remove it")
        step = row.get("step", last_step)
        if not isinstance(step, int | float):
            raise ValueError(f"{path}: line {number} has the step {step!r:.60}, which is no number; mend or remove it")
        if step <= last_step:
            rows.append(line + b"\n")
    new = b"".join(rows)
    if new != old:
        back_up(path, old)
        write_atomically(path, new)
    return len(lines) - len(rows)


def _parse(line: bytes) -> dict | None:
    try:
        row = parse_json(line, "", lenient=True)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
