"""Messages between the driver and the workers of this experiment; see ../side_by_side.py for how.

load(**Job) makes the model and the optimizer; then there are
about() -> parameters, versions, choices made
losses(steps) -> losses, trained from the first weights on
steps(steps) -> losses, going on
inspect() -> what the step is like on its device: peak_bytes, ...
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Job:
    """The model and its rows; the same for both workers."""

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    batch: int
    length: int
    optimizer: dict[str, float]  # learning_rate, b1, b2, eps, weight_decay (of tensors with two dimensions)
    tokens: str  # .npy, int32 [batches, batch, length + 1]
    weights: str = ""  # a Hugging Face GPT-2 folder that holds weights.npz too; '' draws its own
    device: str = "cpu"  # cpu or cuda
    compute_dtype: str = "float32"  # or bfloat16; parameters and optimizer state are float32
    remat: str = "none"  # or full: keep only the input of every block
    compile: bool = False  # torch.compile


class Trainer(Protocol):
    """A Job set up by a worker."""

    def about(self) -> dict[str, Any]:
        """Parameters, versions, choices made."""
        ...

    def reset(self) -> None:
        """Back to the first weights, optimizer state and batch."""
        ...

    def train(self, steps: int) -> list[float]:
        """Train and return all losses; nothing is left running on the device."""
        ...

    def inspect(self) -> dict[str, Any]:
        """Peak memory of the device in bytes (0: not known there), and what the worker has to add."""
        ...


def commands(trainer: Trainer) -> Mapping[str, Callable[..., dict[str, Any]]]:
    """Commands of a worker, for the driver."""

    def losses(steps: int) -> dict[str, Any]:
        trainer.reset()
        return {"losses": trainer.train(steps)}

    return {
        "about": trainer.about,
        "inspect": trainer.inspect,
        "losses": losses,
        "steps": lambda steps: {"losses": trainer.train(steps)},
    }
