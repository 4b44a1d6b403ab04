"""Training: the loop, its steps, the recorder and the summary. `run(config) -> RunResult`.

May import plan, evaluate, inference, runs and what is below them; cli may import it, later compression, graph and rlhf.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.train.loop import RunResult, run

__all__ = ["RunResult", "run"]


def __getattr__(name: str) -> Any:
    # Looked up when used: its parts alone must not import jax.
    if name in __all__:
        return getattr(importlib.import_module("dsjax.train.loop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
