"""`dsjax config show | diff | docs`: what a run file means, how two differ, and every key there is."""

import argparse
import json
from pathlib import Path

from dsjax.config.docs import reference
from dsjax.config.load import differences, flatten, load_run, load_with_origins, to_dict, to_yaml

HELP = "show, compare and document run files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Three verbs of their own."""
    verbs = parser.add_subparsers(dest="action", required=True, metavar="show | diff | docs")
    show = verbs.add_parser("show", help="print a run file with every value filled in")
    show.add_argument("config", metavar="CONFIG", help="run file")
    show.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value (repeatable)")
    show.add_argument("--origins", action="store_true", help="say of each value where it came from")
    show.add_argument("--json", action="store_true", help="print JSON")
    diff = verbs.add_parser("diff", help="print the values in which two run files differ; exit code 1 if any")
    diff.add_argument("a", metavar="A", help="run file")
    diff.add_argument("b", metavar="B", help="run file")
    diff.add_argument("--json", action="store_true", help="print JSON")
    docs = verbs.add_parser("docs", help="print the reference of all keys")
    docs.add_argument("--write", metavar="FILE", help="write it to FILE instead")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0; 1 when `diff` found differences."""
    if arguments.action == "show":
        return _show(arguments)
    if arguments.action == "diff":
        return _diff(arguments)
    if arguments.write:
        Path(arguments.write).write_text(reference(), encoding="utf-8")
        return 0
    print(reference(), end="")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    config, origins = load_with_origins(arguments.config, arguments.set)
    if not arguments.origins:
        print(json.dumps(to_dict(config), indent=2) if arguments.json else to_yaml(config).rstrip())
        return 0
    values = flatten(config)
    if arguments.json:
        print(json.dumps({path: {"value": values[path], "origin": origins[path]} for path in values}, indent=2))
        return 0
    rows = [(path, json.dumps(value, ensure_ascii=False), origins[path]) for path, value in values.items()]
    left, middle = max(len(row[0]) for row in rows), min(30, max(len(row[1]) for row in rows))
    for path, value, origin in rows:
        print(f"{path:<{left}}  {value:<{middle}}  {origin}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    found = differences(load_run(arguments.a), load_run(arguments.b))
    if arguments.json:
        print(json.dumps([{"path": path, "a": a, "b": b} for path, a, b in found], indent=2))
    else:
        width = max((len(path) for path, _, _ in found), default=0)
        for path, a, b in found:
            print(f"{path:<{width}}  {json.dumps(a, ensure_ascii=False)} -> {json.dumps(b, ensure_ascii=False)}")
    return 1 if found else 0
