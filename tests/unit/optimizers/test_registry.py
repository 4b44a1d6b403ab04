"""An optimizer is one file, and its name in the registry: a toy one is named, read from a run file, and created."""

import dataclasses
import importlib
from typing import Literal

import jax.numpy as jnp
import optax
import pytest

from dsjax.config.load import from_dict
from dsjax.config.strict_yaml import ConfigError
from dsjax.optimizers import config, registry
from dsjax.optimizers.api import CreateInputs, StagedTransform, UpdateInputs, lift
from dsjax.optimizers.create import create_optimizer
from dsjax.optimizers.kinds.base import BaseConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SignConfig(BaseConfig):
    """The sign of the gradient, for tests."""

    kind: Literal["sign"] = "sign"
    factor: float = 1.0

    def create(self, inputs: CreateInputs) -> StagedTransform:
        """One stage."""
        return lift(optax.chain(optax.scale_by_sign(), optax.scale(self.factor), inputs.decay(self)))


def make_run() -> type:
    """The optimizer's part of a run file, with the optimizers that are named now."""
    optimizer = importlib.reload(config).OptimizerConfig
    return dataclasses.make_dataclass("Run", [("optimizer", optimizer)], frozen=True)


@pytest.fixture
def run_with_sign():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "OPTIMIZERS", (*registry.OPTIMIZERS, SignConfig))
        yield make_run()
    importlib.reload(config)


def test_a_new_optimizer_is_read_and_created(run_with_sign):
    given = {"kind": "sign", "factor": 3, "weight_decay": 0.5}
    toy = from_dict(run_with_sign, {"optimizer": given}).optimizer
    assert toy == SignConfig(factor=3.0, weight_decay=0.5)
    assert toy.frozen_at(10) == toy and toy.advice(workers=1, steps=10) == []
    params = {"w": jnp.full((2, 2), 4.0), "b": jnp.full(2, 4.0)}
    optimizer = create_optimizer(toy, params, {"w": 0, "b": 0})
    inputs = UpdateInputs(params=params, learning_rate=jnp.float32(0.1))
    gradients = {"w": jnp.full((2, 2), -7.0), "b": jnp.full(2, 7.0)}
    changes, _ = optimizer.updates["full"](gradients, optimizer.init(params), inputs)
    assert changes["w"].ravel().tolist() == pytest.approx([0.1 * (3 - 0.5 * 4)] * 4, rel=1e-6)
    assert changes["b"].tolist() == pytest.approx([-0.1 * 3] * 2, rel=1e-6)  # vectors do not decay


def test_what_is_not_named_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.kind: unknown kind; given 'sign'.*allowed: adamw, lamb, sgd, o"):
        from_dict(make_run(), {"optimizer": {"kind": "sign"}})
