"""An item's function is given a Context and returns an Outcome. Standard library only."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of an item.

    Attributes:
        ours: a few words beside the target.
        passed: whether the target is met; None where it does not apply, as for speeds in a rehearsal.
    """

    ours: str
    passed: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The circumstances of an item.

    Attributes:
        rehearse: tiny sizes on a CPU.
        work: a folder for files, shared by all items.
        result: the file that `note` writes.
        earlier: figures of the items before it, by their function.
        figures: its own so far.
    """

    rehearse: bool
    work: Path
    result: Path
    earlier: dict[str, dict[str, Any]]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def note(self, **figures: Any) -> None:
        """Keep figures, which are in the results even if the item comes to no end."""
        self.figures.update(figures)
        self.write({})

    def write(self, outcome: dict[str, Any]) -> None:
        """Replace the file for the driver as a whole."""
        new = self.result.with_suffix(".new")
        new.write_text(json.dumps({**outcome, "figures": self.figures}))
        os.replace(new, self.result)
