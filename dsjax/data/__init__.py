"""Data: text, tokenizers, token stores, rows and curricula, one folder each. `Curriculum` is for your own pipeline.

May import checkpoint, mesh and observe; objectives, setup and the rooms above may import it. Names are looked up when
they are used, so that `dsjax.data.config` alone does not import numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.data.curriculum.draw import Curriculum

__all__ = ["Curriculum"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("dsjax.data.curriculum.draw"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
