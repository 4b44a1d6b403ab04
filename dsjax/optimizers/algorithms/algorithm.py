"""Interface of an algorithm with stages: staged.py makes a run's optimizer of it, switching.py an optax transform."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax

from dsjax.optimizers.algorithms.onebit_adam import Moments
from dsjax.optimizers.api import Kind
from dsjax.optimizers.workers import Tree, Workers


class Algorithm(Protocol):
    """A frozen dataclass of constants; states are trees in global shapes, updates run on one device's parts."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    names: ClassVar[tuple[str, ...]]
    """Stages, by their numbers; "noop" is of DeepSpeed's first step, which only allocates."""
    kinds: ClassVar[Mapping[str, Kind]]
    """Communication of each stage."""

    @property
    def workers(self) -> Workers:
        """The workers that take part."""
        ...

    @property
    def moments(self) -> Moments:
        """Adam's constants."""
        ...

    @property
    def last_full(self) -> int:
        """The last step before the freeze, counted from 1."""
        ...

    def init(self, params: Tree) -> Any:
        """The first state, in global shapes."""
        ...

    def specs(self, params: Tree) -> Any:
        """PartitionSpecs of the state, as `init` shapes it."""
        ...

    def stage(self, step: Any, freeze_step: Any, xp: Any) -> Any:
        """The number in `names` of the stage of a step (from 0): with numpy on the host, with jax.numpy traced."""
        ...

    def update(
        self, stage: str, gradients: Tree, state: Any, params: Tree, learning_rate: Any, accept: jax.Array
    ) -> tuple[Tree, Any]:
        """The change of the parameters, and the next state."""
        ...

    def shift(self, state: Any) -> Tree | None:
        """The difference of each worker's parameters from the shared ones; None of an algorithm that has none."""
        ...


def stages_of(algorithm: Algorithm) -> tuple[str, ...]:
    """The stages that can occur: "noop" only with DeepSpeed's parity."""
    return tuple(name for name in algorithm.names if name != "noop" or algorithm.moments.deepspeed_parity)
