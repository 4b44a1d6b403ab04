"""Text at the end of a run."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Text written by the model at the end of training."""

    prompt: str = ""
    """The beginning of the sample; '' writes none."""
    max_new_tokens: int = 100
    """Tokens to write."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
