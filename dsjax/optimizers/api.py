"""The interface between an optimizer and a training step.

An optimizer here may run in several *stages* (1-bit Adam: full, compressed): each is its own compiled update, chosen
on the host by the step's number, so that a stage never carries the communication of another. Any optax transform is an
optimizer with one stage (`lift`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dsjax.mesh.tree import Tree
from dsjax.optimizers.kinds.base import BaseConfig

Kind = Literal["full", "compressed", "sync", "local"]
"""Communication of a stage over the workers' axis: mean gradients in float32; compressed gradients or momenta; a
compressed sync of parameters, each worker with its own gradient; or none."""


@dataclasses.dataclass(frozen=True)
class UpdateInputs:
    """Inputs of an update beside gradients and its own state.

    Attributes:
        params: the parameters, float32.
        learning_rate: scalar, float32, from the host's schedule; traced, so a new value compiles nothing.
    """

    params: Tree
    learning_rate: jax.Array


jax.tree_util.register_dataclass(UpdateInputs, data_fields=["params", "learning_rate"], meta_fields=[])

Update = Callable[[Tree, Tree, UpdateInputs], tuple[Tree, Tree]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of a step's gradients: scalars; norm, finite and first_bad are [W] in local and sync stages.

    Attributes:
        norm: the norm that clipping goes by, before it, float32.
        finite: whether the step is done.
        first_bad: number of the first tensor (layers and experts counted one by one) that is not finite, -1 if all are.
        variance: the sum of the second moments, where a stage that depends on it may end; else None.
        worker_skips: steps that single workers have skipped up to now, where they are exchanged; else None.
    """

    norm: Any
    finite: Any
    first_bad: Any
    variance: Any = None
    worker_skips: Any = None


jax.tree_util.register_dataclass(Measured)


@dataclasses.dataclass(frozen=True)
class StagedTransform:
    """An optimizer.

    Attributes:
        init: params -> state.
        updates: stage -> update. 'mean': update(gradients, state, inputs) -> (what to add to the parameters, state).
            'per_worker': update(gradients, state, inputs, loss, clip_norm) -> (what to add, or None; state; Measured).
        stage: (number of a step from 0, the last step before the freeze if that was decided during the run, else
            None) -> the stage it runs in.
        gradients: 'mean': the update gets the gradient of the whole batch, clipped, and is undone if that is not
            finite. 'per_worker': it gets one gradient per worker along a first dimension W, which is sharded over
            `data`; it reduces, clips and skips by itself.
        state_specs: (abstract state, tree of params' specs) -> tree of the state's specs.
        rounds: steps of a run -> stage -> how many of them run in it.
        kinds: stage -> its communication.
        shift: state -> difference of each worker's parameters from the shared ones in the stages `local`, [W, ...]
            ([S, W, ...] for a stack of layers); None of an optimizer without such stages.
        freeze: rule by which the freeze may be decided during the run, or None.
    """

    init: Callable[[Tree], Tree]
    updates: Mapping[str, Callable]
    stage: Callable[[int, int | None], str]
    gradients: Literal["mean", "per_worker"]
    state_specs: Callable[[Tree, Tree], Tree]
    rounds: Callable[[int], dict[str, int]] = lambda steps: {"full": steps}
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=lambda: {"full": "full"})
    shift: Callable[[Tree], Tree] | None = None
    freeze: "FreezeRule | None" = None

    @property
    def local(self) -> frozenset[str]:
        """Stages with gradients at the worker's own parameters: kinds sync and local; loss and metrics are [W]."""
        return frozenset(stage for stage, kind in self.kinds.items() if kind in ("sync", "local"))

    @property
    def no_collectives(self) -> frozenset[str]:
        """Stages in which nothing crosses the workers' axis: kind local."""
        return frozenset(stage for stage, kind in self.kinds.items() if kind == "local")


@dataclasses.dataclass(frozen=True)
class FreezeRule:
    """The variance is frozen when it has settled: when |log(|v_t|_1 / |v_{t-every}|_1)| < tolerance.

    Attributes:
        tolerance: of the logarithm.
        every: steps between two looks.
        lag: steps from the look to the last step before the freeze: what the host can know by then.
    """

    tolerance: float
    every: int
    lag: int


@dataclasses.dataclass(frozen=True)
class CreateInputs:
    """The run that an optimizer is created for: see create.py.

    Attributes:
        params: the parameters or their shapes.
        leading: tree of ints: how many of the first dimensions count tensors (layers, experts).
        mesh: the devices.
        specs: tree of the specs of the optimizer's state of each parameter; None: whole on every device.
        steps: of the whole run.
    """

    params: Tree
    leading: Tree
    mesh: Mesh | AbstractMesh
    specs: Tree = None
    steps: int = 0

    def decays(self, mask: Literal["matrices", "all"]) -> Tree:
        """Tree of bools: the tensors that decay."""
        return jax.tree.map(lambda p, first: mask == "all" or p.ndim - first >= 2, self.params, self.leading)

    def decay(self, config: BaseConfig) -> optax.GradientTransformation:
        """Decoupled weight decay of those tensors."""
        return optax.add_decayed_weights(config.weight_decay, mask=self.decays(config.decay_mask))


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

    return StagedTransform(
        init=transform.init,
        updates={"full": update},
        stage=lambda step, freeze: "full",
        gradients="mean",
        state_specs=state_specs,
    )
