"""The end of a run: summary.json, loss.png, a sample of text, and a table of how it went.

The summary is written first, and once more with what takes long in it: whatever fails here costs itself alone.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsjax.checkpoint.manifest import read_json
from dsjax.config.run import ResolvedRunConfig
from dsjax.data.corpus.build import Corpus
from dsjax.data.corpus.ngram import TooLittleText, baseline
from dsjax.data.rows.labels import CLASS
from dsjax.data.rows.pipeline import validation_rows
from dsjax.inference.sample import draw, draw_command
from dsjax.models.families.build import abstract
from dsjax.models.tree import ModelTree, count_parameters
from dsjax.objectives.registry import objective_of
from dsjax.observe.devices import from_jax_device_kind
from dsjax.observe.flops import mfu
from dsjax.observe.memory import device_memory_report, peak_host_bytes
from dsjax.observe.output import printable
from dsjax.observe.plots import loss_plot
from dsjax.observe.trackers import METRICS_FILE, read_metrics
from dsjax.runs.folder import FAILED, SUMMARY_FILE, RunFolder, write_json
from dsjax.setup.assembly import Setup
from dsjax.train.recorder import Recorder

Utilisation = Callable[[float], float] | None
"""FLOPs per second -> model FLOPs utilisation; None when nobody knows the devices' peak."""


def utilisation(setup: Setup) -> Utilisation:
    """The function from a run's speed to the utilisation of its devices."""
    config, num_devices = setup.config, setup.layout.mesh.size
    peak = config.observe.peak_tflops
    if not peak:
        spec = from_jax_device_kind(jax.devices()[0].device_kind)
        if spec is None:
            return None
        bf16 = config.model.compute_dtype == "bfloat16"
        peak = (spec.peak_bf16_tflops if bf16 else spec.peak_tf32_tflops) or spec.peak_f32_tflops
    return lambda flops_per_second: mfu(flops_per_second, 1.0, peak_flops=peak * 1e12, num_devices=num_devices)


def summarise(
    setup: Setup,
    folder: RunFolder,
    corpus: Corpus,
    recorder: Recorder,
    weights: Callable[[], Any],
    console: Console,
) -> dict[str, Any]:
    """Write summary.json, loss.png and the sample; print the table. Returns the summary.

    Args:
        setup, folder, corpus, console: of the run.
        recorder: of the run; its `failures` get what fails here.
        weights: makes what came of it, adapters merged, when it is asked for.
    """
    if not folder.is_first_process:
        return {}
    config, model = setup.config, ModelTree.of(abstract(setup.config.model))
    rows = read_metrics(folder.path / METRICS_FILE)
    parameters: dict[str, tuple[Any, str]] = {"parameters": (count_parameters(model), "counted")}
    if config.lora is not None:
        how = "counted: adapters, and what the weights lacked for the task"
        parameters["trained_parameters"] = (count_parameters(setup.model), how)
    own = functools.partial(_metrics, setup, corpus, recorder, rows)
    write_json(folder.path / SUMMARY_FILE, _as_json(config.name, parameters | own({}), folder))
    compared = {}
    with _noted("metrics to compare with", recorder):
        compared = _compared(config, corpus, rows)
    metrics = parameters | own(compared)
    summary = _as_json(config.name, metrics, folder)
    with _noted("loss.png", recorder):
        _plot(rows, metrics, folder, title=config.name)
    sample = ""
    with _noted("the sample", recorder, advice=f"draw it by: {draw_command(config.sample, folder.path)}"):
        if config.sample.prompt:
            length, seed = config.data.sequence_length, config.seed
            sample = draw(
                config.sample, folder.path, corpus.tokenizer, model, weights, console, length=length, seed=seed
            )
    summary["sample"] = {"value": sample, "how": f"drawn at temperature {config.sample.temperature}"}
    if recorder.failures:
        summary[FAILED] = {"value": recorder.failures, "how": "what went wrong after the last step"}
    write_json(folder.path / SUMMARY_FILE, summary)
    for failure in recorder.failures:
        console.print(printable(f"warning: {failure}", console.encoding), soft_wrap=True, markup=False)
    with _noted("the table of the outcome", recorder):
        console.print(_table(metrics, title=escape(f"{config.name}: {folder.path}")))
    return summary


@contextlib.contextmanager
def _noted(what: str, recorder: Recorder, *, advice: str = "") -> Iterator[None]:
    """Turn a failure (of memory, of the disk, of the console) into a line of the recorder's."""
    try:
        yield
    except BrokenPipeError:  # nobody reads any more, which is no failure of the run
        raise
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        recorder.failed(what, error, advice=advice)


def _as_json(name: str, metrics: dict[str, tuple[Any, str]], folder: RunFolder) -> dict[str, Any]:
    """The summary; JSON has no NaN: what is not finite is null there."""
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    summary = {"name": name, **{name: {"value": finite(value), "how": how} for name, (value, how) in metrics.items()}}
    return summary | _timed_before(folder, summary)


def _timed_before(folder: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a summary of the same steps that this process, which may only have ended the run, has not measured."""
    if not (folder.path / SUMMARY_FILE).is_file():
        return {}
    try:
        before = read_json(folder.path / SUMMARY_FILE)
    except ValueError:  # it is replaced now
        return {}
    if before.get("steps") != summary["steps"]:
        return {}
    return {name: metric for name, metric in before.items() if name not in (*summary, "sample", FAILED)}


def _plot(rows: list[dict[str, Any]], metrics: dict[str, tuple[Any, str]], folder: RunFolder, *, title: str) -> None:
    """loss.png, if any loss is a number."""
    if not any(math.isfinite(row["loss"]) for row in rows):
        return
    names = [name for name in ("unigram", "bigram") if f"{name}_nats_per_token" in metrics]
    references = {name: metrics[f"{name}_nats_per_token"][0] for name in names}
    loss_plot(rows, folder.path / "loss.png", references=references, title=title)


def _metrics(
    setup: Setup,
    corpus: Corpus,
    recorder: Recorder,
    rows: list[dict[str, Any]],
    compared: dict[str, tuple[Any, str]],
) -> dict[str, tuple[Any, str]]:
    """name -> (value, how it was obtained), with those to compare with in their place."""
    config, counters = setup.config, recorder.counters
    targets = objective_of(config.data.task).targets
    metrics: dict[str, tuple[Any, str]] = {
        "steps": (counters.steps, "counted, skipped ones included"),
        "skipped_steps": (counters.skipped, "steps whose gradient was not finite"),
        "tokens": (counters.tokens, "effective: rows x length x the share of layers that see them, over all steps"),
        "real_tokens": (counters.real_tokens, f"targets that counted in the loss: {targets}"),
        "training_loss": (rows[-1]["loss"], "last step, nats per target"),
    }
    metrics |= _validation_metrics(config, rows) | compared
    if recorder.step_seconds:
        steps = np.array(recorder.step_seconds)
        spread = f"median of {len(steps)} steps, quartiles"
        quartiles = [float(x) for x in np.quantile(steps, [0.25, 0.75])]
        metrics["step_seconds"] = (float(np.median(steps)), f"{spread} {quartiles[0]:.3g} to {quartiles[1]:.3g}")
        metrics["tokens_per_second"] = (
            float(np.median(recorder.token_rates)),
            "effective tokens of a step / its time, median",
        )
        waiting = sum(recorder.data_seconds) / steps.sum()
        metrics["waiting_for_data"] = (
            float(waiting),
            "share of the step time in which the device was idle while rows were fetched and placed",
        )
        if (use := utilisation(setup)) is not None:
            matrices = "6 N" if config.lora is None else "6 N trained + 4 N frozen"
            how = f"FLOPs of a step by {matrices} + 12 L D T, a second, median / (devices x peak)"
            metrics["mfu"] = (use(float(np.median(recorder.flop_rates))), how)
    if recorder.stalls:
        metrics["stall_seconds"] = (
            sum(recorder.stalls),
            f"waiting for programs of {len(recorder.stalls)} steps to be compiled, the first among them",
        )
    metrics["training_seconds"] = (counters.seconds, "sum of step times; compiling and evaluating left out")
    metrics["peak_host_bytes"] = (peak_host_bytes(), "peak resident memory of the first process")
    peaks = [memory.peak for memory in device_memory_report(jax.local_devices()) if memory.peak is not None]
    if peaks:
        metrics["peak_device_bytes"] = (max(peaks), "the fullest device of the first process, by its allocator")
    metrics["data_hash"] = (corpus.hash, "of sources, tokenizer and split")
    return metrics


def _validation_metrics(config: ResolvedRunConfig, rows: list[dict[str, Any]]) -> dict[str, tuple[Any, str]]:
    """The model's validation loss, if it was ever evaluated."""
    evaluated = [row for row in rows if "validation_loss" in row]
    if not evaluated:
        return {}
    losses = [row["validation_loss"] for row in evaluated]
    target = objective_of(config.data.task).targets[:-1]
    when = "last step" if evaluated[-1] is rows[-1] else f"step {evaluated[-1]['step']}"
    metrics: dict[str, tuple[Any, str]] = {
        "validation_loss": (losses[-1], f"nats per {target}, {when}, on the fixed validation rows"),
        "best_validation_loss": (min(losses, key=lambda loss: (math.isnan(loss), loss)), f"nats per {target}"),
    }
    if "validation_accuracy" in evaluated[-1]:
        metrics["validation_accuracy"] = (
            evaluated[-1]["validation_accuracy"],
            f"share of the fixed validation rows, {when}",
        )
    return metrics


def _compared(config: ResolvedRunConfig, corpus: Corpus, rows: list[dict[str, Any]]) -> dict[str, tuple[Any, str]]:
    """Baselines on the same targets that need no training."""
    evaluated = [row for row in rows if "validation_loss" in row]
    compared = _COMPARED.get(config.data.task)
    return {} if compared is None or not evaluated else compared(config, corpus, evaluated[-1]["validation_loss"])


def _majority(config: ResolvedRunConfig, corpus: Corpus, loss: float) -> dict[str, tuple[Any, str]]:
    """The accuracy of always saying the class that is the most frequent in training, on the validation rows used."""
    training = np.concatenate([store.classes[:, CLASS] for store in corpus.train if store.classes is not None])
    commonest = int(np.bincount(training).argmax())
    batch_size = config.train.batch_size // config.train.accumulation
    fixed = validation_rows(corpus, config.data, batch_size=batch_size, num_rows=config.evaluate.rows)
    right = sum(int(((batch["labels"] == commonest) & batch["loss_mask"]).sum()) for batch in fixed)
    how = f"of always saying {corpus.labels[commonest]!r}, the commonest training label"
    return {"majority_accuracy": (right / fixed.num_rows, how)}


def _counted_metrics(config: ResolvedRunConfig, corpus: Corpus, loss: float) -> dict[str, tuple[Any, str]]:
    """Cross-entropy of counted single tokens and pairs on the validation targets of a language model."""
    batch_size = config.train.batch_size // config.train.accumulation
    batches = validation_rows(corpus, config.data, batch_size=batch_size, num_rows=config.evaluate.rows)
    counted = baseline(
        corpus.train,
        batches,
        vocab_size=corpus.tokenizer.vocab_size,
        byte_lengths=corpus.tokenizer.byte_lengths,
        across_documents=not config.data.isolate_documents and config.data.pack == "stream",
    )
    per_byte = counted.num_targets / counted.num_bytes
    how = "of the same validation targets, counted on all training text, interpolated"
    return {
        "validation_nats_per_byte": (loss * per_byte, "the same per UTF-8 byte"),
        "unigram_nats_per_token": (counted.unigram_nats, f"cross-entropy {how}"),
        "bigram_nats_per_token": (counted.bigram_nats, f"cross-entropy {how}"),
        "unigram_nats_per_byte": (counted.unigram_nats_per_byte, "the same per UTF-8 byte"),
        "bigram_nats_per_byte": (counted.bigram_nats_per_byte, "the same per UTF-8 byte"),
    }


def _counted(config: ResolvedRunConfig, corpus: Corpus, loss: float) -> dict[str, tuple[Any, str]]:
    """`_counted_metrics`, if there is text enough to count."""
    with contextlib.suppress(TooLittleText):  # the run is none the worse
        return _counted_metrics(config, corpus, loss)
    return {}


_COMPARED = {"language_model": _counted, "classification": _majority}
"""By the name of the objective."""


def _table(metrics: dict[str, tuple[Any, str]], *, title: str) -> Table:
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("how it was obtained", overflow="fold")
    for name, (value, how) in metrics.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value[:12]
        table.add_row(name.replace("_", " "), shown, how)
    return table
