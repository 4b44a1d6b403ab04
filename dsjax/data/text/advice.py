"""Commands that convert other forms of rows to JSON lines; errors about a .jsonl file recommend them."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

_OPEN = "open(sys.argv[1], encoding='utf-8-sig'{more})"
ONE_A_LINE = 'a source of kind jsonl has one JSON object a line, such as {"text": "..."}'


def from_array(path: Path, key: str = "") -> str:
    """The command for a file that is one array of objects, or an object that has such an array as `key`.

    Example:
        >>> from_array(Path("a.json"))
        'python -c "import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], \
encoding=\\'utf-8-sig\\'))]" a.json > a.jsonl'
    """
    rows = f"json.load({_OPEN.format(more='')})" + (f"[{key!r}]" if key else "")
    return _command(path, "json, sys", rows)


def from_table(path: Path, delimiter: str) -> str:
    """The command for a CSV file whose first line names the columns."""
    more = f", delimiter={delimiter!r}" if delimiter != "," else ""
    newline = ", newline=''"
    return _command(path, "csv, json, sys", f"csv.DictReader({_OPEN.format(more=newline)}{more})")


def _command(path: Path, modules: str, rows: str) -> str:
    stem = path.name.split(".")[0] or "rows"
    if path.name == f"{stem}.jsonl":
        stem += "-lines"
    name, written = shlex.quote(path.name), shlex.quote(f"{stem}.jsonl")
    return f'python -c "import {modules}; [print(json.dumps(row)) for row in {rows}]" {name} > {written}'


def for_rows(path: Path, head: str) -> str:
    """Advise on a file, which begins with `head`, whose lines are not all JSON objects.

    Example:
        >>> for_rows(Path("a.csv"), "text,label\\nfine,1\\n")[:57]
        'it looks like a table of values with "," between them; a '
    """
    first = head.lstrip("\ufeff \t\r\n")
    line = first.partition("\n")[0]
    if first.startswith("["):
        return f"the file is one JSON array; {ONE_A_LINE}; convert it: {from_array(path)}"
    if not first.startswith("{"):
        for delimiter in ("\t", ",", ";"):
            if path.name.lower().endswith((".csv", ".tsv")) and delimiter in line:
                return (
                    f'it looks like a table of values with "{delimiter}" between them; {ONE_A_LINE}; convert it: '
                    f"{from_table(path, delimiter)}"
                )
        return f"{ONE_A_LINE}; for plain text use kind text"
    if line.strip() == "{" or not line.rstrip().endswith("}"):
        command = _command(path, "json, sys", f"[json.load({_OPEN.format(more='')})]")
        return f"{ONE_A_LINE}; where one object goes over several lines, write it on one: {command}"
    return ONE_A_LINE


def for_missing_key(path: Path, row: Mapping[str, object]) -> str:
    """Advise on a row that lacks the key, but holds the rows as one of its values; "" if it does not.

    Example:
        >>> for_missing_key(Path("a.json"), {"version": 1, "data": [{"text": "a"}]})[:56]
        ". Its key 'data' holds 1 objects: write these one a line"
    """
    for key, value in row.items():
        if (
            re.fullmatch(r"\w+", key)
            and isinstance(value, list)
            and value
            and all(isinstance(item, dict) for item in value)
        ):
            return f". Its key {key!r} holds {len(value):,} objects: write these one a line: {from_array(path, key)}"
    return ""
