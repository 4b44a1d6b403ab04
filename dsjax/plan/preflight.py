"""Checks before the first step of all that a run needs at its end: `train` asks here, and `plan` does.

What only a config decides is refused, all of it at once; what may be meant all the same is a line of advice. Packages
that are missing `train` refuses and `plan`, which may be for another machine, says; so with the disk (disk.py).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from dsjax.config.run import ResolvedRunConfig
from dsjax.data.config import (
    ByteTokenizer,
    DataConfig,
    DifficultySchedule,
    FileTokenizer,
    FixedDiscrete,
    FixedLinear,
    FixedRoot,
    TokensSource,
)
from dsjax.data.corpus.store import open_corpus_folder
from dsjax.data.curriculum.analyze import metrics_of
from dsjax.data.curriculum.metrics import code_of
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.data.tokenizers.tokenizer import Tokenizer, byte_tokenizer
from dsjax.evaluate.config import EvaluateConfig
from dsjax.inference.sample import check_sample
from dsjax.mesh.processes import from_first
from dsjax.observe.config import ObserveConfig
from dsjax.observe.plots import require_plots
from dsjax.observe.trackers import require_packages
from dsjax.optimizers.kinds.base import ScheduleConfig
from dsjax.runs.corpus import check_vocabulary
from dsjax.setup.schedule import StepSchedule


def check_end(config: ResolvedRunConfig, tokenizer: Tokenizer | None = None) -> None:
    """Refuse a config whose run would fail after its last step, or count for nothing.

    Args:
        config: the run.
        tokenizer: its tokenizer, once the text is read; before that the one that is known without, if there is one.

    Raises:
        ValueError: everything that is wrong.
    """
    if tokenizer is None:
        tokenizer = known_tokenizer(config.data)
    checks: list[Callable[[], Any]] = [
        lambda: _check_evaluation(config.evaluate, config.observe),
        lambda: check_sample(config.sample, config.model, tokenizer),
    ]
    if config.curriculum is not None:
        names = metrics_of(config.curriculum)
        checks.append(lambda: [code_of(name) for name in names])  # measured after the text is read
    if tokenizer is not None:
        size = tokenizer.vocab_size
        checks.append(lambda: check_vocabulary(size, config.model))
    refuse_all(checks)


def refuse_all(checks: Iterable[Callable[[], Any]]) -> None:
    """Make all checks, and refuse with what all of them say.

    Raises:
        ValueError: a line for each that raised one.

    Example:
        >>> refuse_all([lambda: int("a"), lambda: None, lambda: int("b")])
        Traceback (most recent call last):
        ValueError: invalid literal for int() with base 10: 'a'
        invalid literal for int() with base 10: 'b'
    """
    problems = []
    for check in checks:
        try:
            check()
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        raise ValueError("\n".join(problems))


def known_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of a run if it is known before any text is read and lies on this machine, else None.

    Raises:
        ValueError: it is there and cannot be read.
    """
    if isinstance(config.tokenizer, ByteTokenizer):
        return byte_tokenizer()
    if isinstance(config.tokenizer, FileTokenizer):
        there = Path(config.tokenizer.path).expanduser().exists()
        return load_tokenizer(config.tokenizer) if there else None
    for source in config.sources:
        if isinstance(source, TokensSource) and Path(source.path).expanduser().exists():
            return open_corpus_folder(Path(source.path).expanduser()).tokenizer
    return None


def _check_evaluation(evaluate: EvaluateConfig, observe: ObserveConfig) -> None:
    """Refuse numbers below 0: no row would be evaluated, and no metric made of that."""
    numbers = {f"evaluate.{name}": getattr(evaluate, name) for name in ("every", "rows", "batch_size")}
    numbers["observe.peak_tflops"] = observe.peak_tflops
    if wrong := [f"{name} = {value}" for name, value in numbers.items() if value < 0]:
        raise ValueError(f"{' and '.join(wrong)} must be 0 or more")


def require_tools(observe: ObserveConfig) -> None:
    """Refuse to begin what the first process cannot draw or track for want of a package; all processes call it.

    Raises:
        ValueError: names the package and how it is installed.
    """
    missing = missing_tools(observe) if jax.process_index() == 0 else []
    if problem := from_first("; ".join(missing)):
        raise ValueError(problem)


def missing_tools(observe: ObserveConfig) -> list[str]:
    """Packages that plots or trackers need and that are missing, as a line."""
    try:
        require_plots()
        require_packages(observe)
    except ValueError as problem:
        return [str(problem)]
    return []


def advise(config: ResolvedRunConfig, schedule: StepSchedule, *, workers: int, processes: int = 1) -> list[str]:
    """Warnings about settings that a user may not have meant, a line each.

    Args:
        config: the run.
        schedule: all its steps.
        workers: size of the mesh's axis `data`.
        processes: that train together.
    """
    steps = schedule.num_steps
    lines = config.optimizer.advice(workers=workers, steps=steps, growing_until=schedule.settled)
    lines += late_schedule(config.optimizer.schedule, schedule)
    lines += [
        f"{name} = {length:,} steps is longer than the run, {steps:,} steps: it never gets to its end"
        for name, length in _growing(config).items()
        if length > steps
    ]
    start = config.observe.profile.partition(":")[0]
    if start and int(start) > steps:
        lines.append(f"observe.profile {config.observe.profile} begins after the last step, {steps}: no trace")
    if config.sample.prompt and processes > 1:
        lines.append("sample.prompt: no sample is drawn with several processes; `dsjax generate` draws it afterwards")
    return lines


def late_schedule(rate: ScheduleConfig, schedule: StepSchedule) -> list[str]:
    """Lines about a warm-up that is longer than the run, or that leaves no steps for the decay.

    Example:
        >>> from dsjax.setup.config import TrainConfig
        >>> from dsjax.setup.schedule import make_schedule
        >>> schedule = make_schedule(TrainConfig(steps=20, batch_size=2), None, None, sequence_length=8, num_layers=1)
        >>> late_schedule(ScheduleConfig(warmup=40), schedule)
        ['optimizer.schedule.warmup = 40 steps is longer than the run, 20 steps: the learning rate only gets to 50% of \
its peak']
        >>> late_schedule(ScheduleConfig(warmup=320, warmup_by="tokens"), schedule)
        []
    """
    end = schedule.clocks(schedule.num_steps).read(rate.warmup_by)
    unit = rate.warmup_by.replace("_", " ")
    lines = []
    if rate.warmup > end:
        share = (end / rate.warmup) ** rate.warmup_power
        lines.append(
            f"optimizer.schedule.warmup = {rate.warmup:,} {unit} is longer than the run, {end:,} {unit}: the "
            f"learning rate only gets to {share:.0%} of its peak"
        )
    falls = rate.kind in ("linear", "cosine") and rate.decay_by == rate.warmup_by
    if falls and 0 < rate.decay <= rate.warmup:
        lines.append(
            f"optimizer.schedule.decay = {rate.decay:,} {unit} ends within the warm-up of {rate.warmup:,}: the "
            "learning rate drops to its least in one step; both are counted from the start"
        )
    return lines


def _growing(config: ResolvedRunConfig) -> dict[str, int]:
    """Setting -> the step at which what it makes grow has grown."""
    found: dict[str, int] = {}
    if config.random_ltd is not None:
        found["random_ltd.steps"] = config.random_ltd.steps
    if config.curriculum is not None:
        schedules: dict[str, DifficultySchedule] = {
            f"curriculum.difficulty.{at}.schedule": one.schedule for at, one in enumerate(config.curriculum.difficulty)
        }
        if config.curriculum.length is not None:
            schedules["curriculum.length.schedule"] = config.curriculum.length.schedule
        for name, schedule in schedules.items():
            if isinstance(schedule, FixedLinear | FixedRoot):
                found[f"{name}.steps"] = schedule.steps
            elif isinstance(schedule, FixedDiscrete) and schedule.until:
                found[f"{name}.until"] = schedule.until[-1]
    return found
