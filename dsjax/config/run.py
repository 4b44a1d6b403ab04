"""RunConfig: everything a run needs, composed from the rooms' own dataclasses."""

import dataclasses
import unicodedata

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.data.config import CurriculumConfig, DataConfig
from dsjax.evaluate.config import EvaluateConfig
from dsjax.inference.config import SampleConfig
from dsjax.mesh.config import MeshConfig
from dsjax.models.config import AnyModelConfig, LoRAConfig, ModelConfig, RandomLTDConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.observe.config import ObserveConfig
from dsjax.optimizers.config import DEFAULT_OPTIMIZER, OptimizerConfig
from dsjax.setup.config import TrainConfig

_LONGEST_NAME = 200  # bytes; file systems take 255, and runs of one name get numbers


def check_name(name: str) -> None:
    """Refuse a run's name that is not that of one folder in runs/.

    Raises:
        ValueError: says what is wrong with it, and what is allowed.

    Example:
        >>> check_name("my run, lr=3e-4")
        >>> check_name("lab/run")
        Traceback (most recent call last):
        ...
        ValueError: name is that of a folder in runs/, and 'lab/run' holds '/'; leave that out (--run-dir DIR puts a \
run anywhere)
    """
    # Separators of Windows too: a folder is copied from one system to another.
    bad = next((c for c in name if c in "/\\" or unicodedata.category(c) in ("Cc", "Cs")), None)
    if not name:
        problem = "it is empty; give at least one character"
    elif bad is not None:
        problem = f"{name!r} holds {bad!r}; leave that out (--run-dir DIR puts a run anywhere)"
    elif name[0] in ".-":
        problem = f"{name!r} begins with {name[0]!r}; begin with a letter or a digit"
    elif len(name.encode()) > _LONGEST_NAME:
        problem = f"{name[:20]!r}... has {len(name.encode())} bytes; give at most {_LONGEST_NAME}"
    else:
        return
    raise ValueError(f"name is that of a folder in runs/, and {problem}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run.

    Example:
        >>> RunConfig(train=TrainConfig(steps=10)).seed
        0
    """

    name: str = "run"
    """Names the run folder, in runs/, when --run-dir does not; no separators, no dot or dash in front."""
    seed: int = 0
    """Seed of initial weights, dropout and dropped tokens."""
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
    optimizer: OptimizerConfig = dataclasses.field(default_factory=DEFAULT_OPTIMIZER)
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

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRunConfig(RunConfig):
    """A run config with the model spelt out and data.task resolved (`dsjax.setup.resolve.resolved`)."""

    model: ModelConfig = dataclasses.field(default_factory=BloomConfig)
    """The model, of a family."""
