"""The row of a step: metrics of the layers beside those that every run has, none of them with the name of another."""

import io

import jax.numpy as jnp
from rich.console import Console

from dsjax.objectives.api import TAKEN
from dsjax.observe.progress import Progress
from dsjax.observe.trackers import JsonlTracker, read_metrics
from dsjax.optimizers.schedules import Clocks
from dsjax.runs.counters import Counters
from dsjax.train.recorder import Recorder, StepMetrics


def test_auxiliary_metrics_are_in_the_row_and_on_the_line(tmp_path):
    shown = io.StringIO()
    with Progress(2, console=Console(file=shown, width=100)) as progress:
        recorder = Recorder(
            Counters(),
            [JsonlTracker(tmp_path / "metrics.jsonl")],
            progress,
            max_skipped=3,
            utilisation=lambda flops: flops,
            tensor_names=["table"],
        )
        device = {"loss": 3.0, "tokens": 7, "grad_norm": 1.0, "finite": False, "first_bad": 0, "worker_skips": 1}
        recorder.add(
            StepMetrics(
                step=1,
                device={name: jnp.asarray(value) for name, value in device.items()},
                # Of two workers that do not talk: the mean.
                auxiliary={"balance": jnp.array([0.25, 0.75]), "busiest": jnp.float32(0.375)},
                learning_rate=0.1,
                after=Clocks(1, 8, 16),
                flops=1.0,
                schedule={"length": 8},
                data_seconds=0.0,
                compiles=True,
                stall=0.1,
            )
        )
        recorder.flush(validation_loss=2.0, validation_accuracy=0.5)
        recorder.close()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["balance"] == 0.5 and row["busiest"] == 0.375
    assert "balance 0.5" in shown.getvalue()
    # Every other name is one that a layer's metric may not have.
    assert row.keys() - {"balance", "busiest"} <= TAKEN
