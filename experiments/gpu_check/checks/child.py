"""The process of one item: run.py starts it with a folder that holds message.json, and reads result.json there."""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

from item import Context


def main() -> None:
    folder = Path(sys.argv[1])
    message = json.loads((folder / "message.json").read_text())
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
