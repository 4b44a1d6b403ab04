"""Small runs for the planner's tests."""

import math
from typing import Any

import jax

from dsjax.config.load import from_dict
from dsjax.config.run import RunConfig
from dsjax.mesh.build import make_mesh
from dsjax.mesh.layout import Layout


def config(
    *,
    kind="gpt2",
    remat="none",
    width=64,
    num_layers=4,
    vocab_size=256,
    dropout=0.0,
    accumulation=1,
    ema_decay=0.0,
    more=None,
    **mesh,
) -> RunConfig:
    """A model 64 wide, 16 rows of 32 tokens; `mesh` are fields of MeshConfig, `more` of the model's config."""
    model: dict[str, Any] = {"kind": kind, "remat": remat, "model_dim": width, "num_layers": num_layers}
    model |= {"vocab_size": vocab_size, "num_heads": 4, "dropout": dropout, **(more or {})}
    train = {"steps": 1, "batch_size": 16, "accumulation": accumulation, "ema_decay": ema_decay}
    tree = {"mesh": {"data": 1, **mesh}, "model": model, "data": {"sequence_length": 32}, "train": train}
    return from_dict(RunConfig, tree)


def layout_of(run: RunConfig) -> Layout:
    """The run's layout on the first virtual devices."""
    num = math.prod((run.mesh.data, run.mesh.fsdp, run.mesh.expert, run.mesh.tensor))
    return Layout(make_mesh(run.mesh, devices=jax.devices()[:num]), run.mesh.zero_stage)
