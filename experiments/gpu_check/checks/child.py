"""The process of one item: run.py starts it with a folder that holds message.json, and reads result.json there."""

import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import traceback
import types
from pathlib import Path

from item import Context

GRACE = 2  # seconds: run.py stops it at the limit


def report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print a traceback and, as the last line, which run.py shows, the error: JAX puts notes of its own after it."""
    traceback.print_exception(kind, error, trace)
    first, *_ = str(error).strip().splitlines() or [""]
    print(f"{kind.__name__}: {first}" if first else kind.__name__, file=sys.stderr)


def main() -> None:
    sys.excepthook = report
    folder = Path(sys.argv[1])
    message = json.loads((folder / "message.json").read_text())
    signal.alarm(math.ceil(message["limit"]) + GRACE)  # also if run.py was killed and nobody stops this process
    work = Path(message["work"])
    context = Context(
        rehearse=message["rehearse"], work=work, result=folder / "result.json", earlier=message["earlier"]
    )
    module, _, name = message["function"].partition(":")
    outcome = vars(importlib.import_module(module))[name](context)
    context.write(dataclasses.asdict(outcome))
    # All is said: a device that does not let go in order is no failure of the item.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
