"""Model families. `load_pretrained` gives a model from a Hugging Face folder.

The two names are looked up when they are used: whoever reads only `dsjax.models.config` does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.models.formats.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("dsjax.models.formats.pretrained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
