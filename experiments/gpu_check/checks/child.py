"""The process of one item: run.py starts it with a message in JSON."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

from item import Context


def main() -> None:
    message = json.loads(sys.argv[1])
    work = Path(message["work"])
    context = Context(
        rehearse=message["rehearse"], work=work, result=Path(message["result"]), earlier=message["earlier"]
    )
    module, _, name = message["function"].partition(":")
    outcome = vars(importlib.import_module(module))[name](context)
    context.write(dataclasses.asdict(outcome))


if __name__ == "__main__":
    main()
