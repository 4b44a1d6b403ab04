"""RunConfig: everything a run needs, composed from the rooms' own dataclasses."""

import dataclasses

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.data.config import CurriculumConfig, DataConfig
from dsjax.mesh.config import MeshConfig
from dsjax.models.config import AnyModelConfig, BloomConfig, LoRAConfig, ModelConfig, RandomLTDConfig
from dsjax.observe.config import ObserveConfig
from dsjax.optimizers.config import AdamWConfig, OptimizerConfig
from dsjax.train.config import EvaluateConfig, SampleConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run.

    Example:
        >>> RunConfig(train=TrainConfig(steps=10)).seed
        0
    """

    name: str = "run"
    """Names the run folder when --run-dir does not."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices."""
    model: AnyModelConfig = dataclasses.field(default_factory=BloomConfig)
    """The model."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters beside the weights of model.init_from, which stay as they are; null trains everything."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Text and tokens."""
    curriculum: CurriculumConfig | None = None
    """Draw easy rows or short ones first; null draws all of them from the start."""
    random_ltd: RandomLTDConfig | None = None
    """Drop tokens in the middle layers while training; null drops none."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamWConfig)
    """The optimizer and its schedule."""
    train: TrainConfig
    """The training loop."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    """Validation."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Saving."""
    observe: ObserveConfig = dataclasses.field(default_factory=ObserveConfig)
    """Trackers and traces."""
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    """Text at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRunConfig(RunConfig):
    """A run config whose model is spelt out and whose data know what they are for (`dsjax.train.folder.resolved`)."""

    model: ModelConfig = dataclasses.field(default_factory=BloomConfig)
    """The model, of a family."""
