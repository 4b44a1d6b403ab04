"""Optimizers: optax transforms with compressed communication, and helpers for your own training step.

May import collectives, mesh and observe; setup and the rooms above may import it. Names are looked up when they are
used, so that `dsjax.optimizers.config` alone does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.optimizers.sharded_step import per_worker, state_shardings, state_specs, worker_grads, worker_params
    from dsjax.optimizers.transforms import onebit_adam, onebit_lamb, scale_by_onebit_adam, zero_one_adam

__all__ = [
    "onebit_adam",
    "onebit_lamb",
    "per_worker",
    "scale_by_onebit_adam",
    "state_shardings",
    "state_specs",
    "worker_grads",
    "worker_params",
    "zero_one_adam",
]
_STEP = {"per_worker", "state_shardings", "state_specs", "worker_grads", "worker_params"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "sharded_step" if name in _STEP else "transforms"
        return getattr(importlib.import_module(f"dsjax.optimizers.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
