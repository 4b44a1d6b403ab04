"""What a training step needs to know of an optimizer, and nothing else.

An optimizer here may run in several *stages* (1-bit Adam: full, compressed): each is its own compiled update, chosen
on the host by the step's number, so that a stage never carries the communication of another. Any optax transform is an
optimizer with one stage (`lift`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from jax.sharding import PartitionSpec

Tree = Any


@dataclasses.dataclass(frozen=True)
class UpdateInputs:
    """What an update gets beside gradients and its own state.

    Attributes:
        params: the parameters, float32.
        learning_rate: scalar, float32, from the host's schedule; traced, so a new value compiles nothing.
    """

    params: Tree
    learning_rate: jax.Array


jax.tree_util.register_dataclass(UpdateInputs, data_fields=["params", "learning_rate"], meta_fields=[])

Update = Callable[[Tree, Tree, UpdateInputs], tuple[Tree, Tree]]


@dataclasses.dataclass(frozen=True)
class StagedTransform:
    """An optimizer.

    Attributes:
        init: params -> state.
        updates: stage -> update; update(gradients, state, inputs) -> (what to add to the parameters, state).
        stage: number of a step (from 0) -> the stage it runs in.
        gradients: 'mean': the update gets the gradient of the whole batch. 'per_worker': it gets one gradient per
            worker along a first dimension W, which is sharded over `data`, and reduces them itself.
        state_specs: (abstract state, tree of params' specs) -> tree of the state's specs.
    """

    init: Callable[[Tree], Tree]
    updates: Mapping[str, Update]
    stage: Callable[[int], str]
    gradients: Literal["mean", "per_worker"]
    state_specs: Callable[[Tree, Tree], Tree]


def lift(transform: optax.GradientTransformation) -> StagedTransform:
    """An optax transform (without its learning rate) as an optimizer with the one stage 'full'.

    The learning rate is applied here, to whatever the transform returns.

    Example:
        >>> import jax.numpy as jnp
        >>> sgd = lift(optax.identity())
        >>> inputs = UpdateInputs(params={"w": jnp.ones(2)}, learning_rate=jnp.float32(0.5))
        >>> sgd.updates["full"]({"w": jnp.ones(2)}, sgd.init(inputs.params), inputs)[0]["w"].tolist()
        [-0.5, -0.5]
    """

    def update(gradients: Tree, state: Tree, inputs: UpdateInputs) -> tuple[Tree, Tree]:
        directions, state = transform.update(gradients, state, inputs.params)
        return jax.tree.map(lambda u: -inputs.learning_rate * u, directions), state

    def state_specs(state: Tree, param_specs: Tree) -> Tree:
        # map_params wants the params' tree; the specs are looked up in the order of its leaves.
        return optax.tree_utils.tree_map_params(
            transform,
            lambda _, spec: spec,
            state,
            param_specs,
            transform_non_params=lambda _: PartitionSpec(),
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )

    return StagedTransform(transform.init, {"full": update}, lambda step: "full", "mean", state_specs)
