"""A run assembled once: config -> mesh -> model (abstract) -> schedule -> optimizer -> shardings -> programs.

The loop trains a `Setup`, the planner measures one on a mesh without devices, `plan --compile` compiles one, a
conversion writes the first state of one. Several models on one mesh are several setups with the same layout.
"""

import dataclasses
import functools

from dsjax.config.run import ResolvedRunConfig, RunConfig
from dsjax.mesh.build import make_mesh
from dsjax.mesh.layout import Layout
from dsjax.models.adapter_training import first_params, split_model
from dsjax.models.families.build import check_divisible, check_length, initial_params
from dsjax.models.formats.pretrained import initial_weights
from dsjax.models.tree import ModelTree
from dsjax.objectives.registry import objective_of
from dsjax.optimizers.api import StagedTransform, Tree
from dsjax.setup.placement import Placement, training_placements
from dsjax.setup.programs import Programs, make_programs
from dsjax.setup.resolve import resolved, schedule_of
from dsjax.setup.schedule import StepSchedule
from dsjax.setup.state import (
    TrainState,
    abstract_state,
    init_state,
    make_optimizer,
    placed,
    state_around,
    state_specs,
)
from dsjax.setup.step import StepOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """All that follows from a run's config and its devices, before any data is read; no array is made.

    What is no attribute is made when it is first asked for, and kept.

    Attributes:
        config: of the run, resolved.
        layout: the mesh and the ZeRO stage; a mesh without devices does for all but `placements` and `programs`.
        model: the part that is trained, as trees of its parameters.
        frozen: the rest of the model; None when all of it is trained.
        schedule: of the run.
        optimizer: of `model`.

    Example:
        >>> from dsjax.models.families.bloom.config import BloomConfig
        >>> from dsjax.setup.config import TrainConfig
        >>> small = BloomConfig(vocab_size=64, num_layers=2, model_dim=16, num_heads=2)
        >>> setup = assemble(RunConfig(model=small, train=TrainConfig(steps=3)))
        >>> setup.schedule.num_steps, setup.shapes.params["embed"]["table"].shape, list(setup.programs.updates)
        (3, (64, 16), ['full'])
    """

    config: ResolvedRunConfig
    layout: Layout
    model: ModelTree
    frozen: ModelTree | None
    schedule: StepSchedule
    optimizer: StagedTransform

    @functools.cached_property
    def options(self) -> StepOptions:
        """Options of a step: its objective, and the settings that change it."""
        train, model = self.config.train, self.config.model
        return StepOptions(
            objective=objective_of(self.config.data.task),
            clip_norm=train.clip_norm,
            ema_decay=train.ema_decay,
            dropout=model.dropout > 0 or model.attention_dropout > 0,
            random_ltd=self.config.random_ltd,
        )

    @functools.cached_property
    def specs(self) -> TrainState:
        """PartitionSpecs of the state."""
        ema = self.config.train.ema_decay > 0
        return state_specs(self.layout, self.model, self.optimizer, ema=ema)

    @functools.cached_property
    def shardings(self) -> TrainState:
        """NamedShardings of the state."""
        return placed(self.layout, self.specs)

    @functools.cached_property
    def shapes(self) -> TrainState:
        """Shapes of the state, with their shardings."""
        return abstract_state(self.model, self.optimizer, self.shardings)

    @functools.cached_property
    def placements(self) -> dict[int, Placement]:
        """Number of rows -> where a batch of so many lies.

        Raises:
            ValueError: a batch cannot be cut evenly.
        """
        return training_placements(self.layout, self.schedule, accumulation=self.config.train.accumulation)

    @functools.cached_property
    def programs(self) -> Programs:
        """The jitted programs; each is compiled by its first call, or ahead, by setup/dispatch.py."""
        return make_programs(self.model, self.optimizer, self.layout, self.shardings, self.options)


def assemble(config: RunConfig, *, layout: Layout | None = None) -> Setup:
    """Assemble a run.

    Args:
        config: the run.
        layout: where it runs, such as the layout of another model; None makes the mesh of the config on all devices.

    Raises:
        ValueError: the config does not fit the devices, the weights it starts from or itself.
    """
    config = resolved(config)  # `run` has done so already: it stays as it is
    if layout is None:
        layout = Layout(make_mesh(config.mesh), config.mesh.zero_stage)
    check_divisible(config.model, layout.mesh.shape)
    check_length(config.model, config.data.sequence_length)
    model, frozen = split_model(config.model, config.lora)
    schedule = schedule_of(config)
    optimizer = make_optimizer(config.optimizer, model, layout, steps=schedule.num_steps)
    return Setup(config, layout, model, frozen, schedule, optimizer)


def first_state(setup: Setup) -> tuple[TrainState, Tree | None]:
    """The state before the first step on its shards, and the parameters that are not trained: None when all are.

    Parameters are the weights that the config names (model.init_from), or are drawn.
    """
    config, optimizer, shardings = setup.config, setup.optimizer, setup.shardings
    if config.lora is not None:
        params, frozen = first_params(config.model, setup.model, setup.layout, seed=config.seed)
        return state_around(params, optimizer, shardings, seed=config.seed), frozen
    if config.model.init_from:
        params = initial_weights(config.model, shardings=shardings.params, seed=config.seed)
        return state_around(params, optimizer, shardings, seed=config.seed), None
    make = functools.partial(initial_params, config.model)
    return init_state(make, optimizer, shardings, seed=config.seed), None


def frozen_params(setup: Setup) -> Tree | None:
    """The parameters that are not trained, on their shards; None when all are: a checkpoint does not hold them."""
    if setup.config.lora is None:
        return None
    return first_params(setup.config.model, setup.model, setup.layout, seed=setup.config.seed)[1]
