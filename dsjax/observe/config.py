"""Settings of trackers and traces, beside metrics.jsonl, which is always written."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObserveConfig:
    """Trackers and traces."""

    tensorboard: bool = False
    """Write TensorBoard events (needs the extra `tensorboard`)."""
    wandb_project: str = ""
    """Log to this Weights & Biases project (needs the extra `wandb`)."""
    profile: str = ""
    """START:STOP, the steps of which a trace is written; '' writes none."""
    peak_tflops: float = 0.0
    """Peak of one device for model FLOPs utilisation; 0 looks the device up, and leaves MFU out if unknown."""

    def __post_init__(self) -> None:
        if self.profile:
            start, colon, stop = self.profile.partition(":")
            if not (colon and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
                raise ValueError(f"profile must be START:STOP with START < STOP; got {self.profile!r}")
