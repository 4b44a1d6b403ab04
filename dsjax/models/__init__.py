"""Models: the transformer of every family, its generation, adapters, and `load_pretrained` for Hugging Face folders.

May import layers, collectives, checkpoint, mesh, observe and pallas_kernels; objectives, setup and the rooms above may
import it. The two names are looked up when they are used, so that `dsjax.models.config` alone does not import jax.
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
