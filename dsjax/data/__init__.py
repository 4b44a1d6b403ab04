"""Data. The names here are for pipelines of one's own.

They are looked up when they are used: whoever reads only `dsjax.data.config` does not import numpy.
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
