"""Difficulty as a function of the step (DeepSpeed, data_pipeline/curriculum_scheduler.py, and the same for random-LTD).

With t the step, T the number of steps, q the quantum and r the degree of the root

    v = floor((t / T)^(1 / r) (max - min) + min)        difficulty = min(v - v mod q, max)

exactly as upstream, which means: a min that is no multiple of q begins below itself, and a max that is none is reached
not at T but when the line, which goes on, passes the next multiple. Curricula count steps from 1, random-LTD from 0.
A difficulty of 0 is refused, where upstream would draw nothing.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int64

from dsjax.data.config import (
    CurriculumConfig,
    CustomSchedule,
    DifficultySchedule,
    FixedDiscrete,
    FixedLinear,
    FixedRoot,
)

Steps = Int64[np.ndarray, " n"]


def difficulty(schedule: DifficultySchedule, steps: Steps, *, least: int, most: int) -> Int64[np.ndarray, " n"]:
    """The difficulty at each of some steps.

    Args:
        schedule: how it grows.
        steps: t.
        least: min.
        most: max.

    Raises:
        ValueError: a function of the user's own gives what is no whole number from 1 on.

    Example:
        >>> difficulty(FixedLinear(steps=8, quantum=2), np.arange(1, 11), least=2, most=10).tolist()
        [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]
    """
    match schedule:
        case FixedLinear():
            values = grown(steps, schedule.steps, least=least, most=most, quantum=schedule.quantum)
        case FixedRoot():
            values = grown(
                steps, schedule.steps, least=least, most=most, quantum=schedule.quantum, degree=schedule.degree
            )
        case FixedDiscrete():
            # With `until` inclusive, a step's place is the number of bounds below it.
            values = np.asarray(schedule.difficulties, np.int64)[np.searchsorted(schedule.until, steps, side="left")]
        case CustomSchedule():
            values = _custom(schedule.function, steps)
    return np.minimum(values, most)


def grown(steps: Steps, total: int, *, least: int, most: int, quantum: int, degree: int = 1) -> Int64[np.ndarray, " n"]:
    """fixed_root, or with degree 1 fixed_linear.

    Example:
        >>> grown(np.array([447, 448, 110_000]), 110_000, least=80, most=2048, quantum=8).tolist()
        [80, 88, 2048]
    """
    share = np.asarray(steps, np.float64) / total
    values = np.floor((share if degree == 1 else share ** (1.0 / degree)) * (most - least) + least).astype(np.int64)
    return np.minimum(values - values % quantum, most)


def difficulties(config: CurriculumConfig, step: int) -> dict[str, int]:
    """Greatest difficulty of rows at a step counted from 0, by the names of the metrics (whole paths if two end alike).

    Example:
        >>> from dsjax.data.config import DifficultyConfig
        >>> config = CurriculumConfig(difficulty=(DifficultyConfig(schedule=FixedLinear(steps=10, quantum=1)),))
        >>> difficulties(config, 4)
        {'vocab_rarity': 50}
    """
    at = np.array([step + 1])
    paths = [one.metric for one in config.difficulty]
    ends = [path.rpartition(".")[2] for path in paths]
    names = ends if len(set(ends)) == len(ends) else paths
    return {
        name: int(difficulty(one.schedule, at, least=one.min, most=one.max)[0])
        for name, one in zip(names, config.difficulty, strict=True)
    }


def _custom(path: str, steps: Steps) -> Int64[np.ndarray, " n"]:
    function = imported(path)
    values = np.empty(len(steps), np.int64)
    for place, step in enumerate(steps.tolist()):
        value = function(step)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{path}({step}) gave {value!r}; a difficulty must be a whole number from 1 on")
        values[place] = value
    return values


def imported(path: str) -> Callable[..., Any]:
    """A user's function by its dotted path.

    Raises:
        ValueError: there is no such module or function.

    Example:
        >>> imported("math.floor")(2.5)
        2
    """
    module, _, name = path.rpartition(".")
    try:
        found = vars(importlib.import_module(module or path)).get(name)
    except ImportError as error:
        raise ValueError(f"cannot import {module or path!r} of {path!r}: {error}; is it on PYTHONPATH?") from error
    if not callable(found):
        raise ValueError(f"{path!r} names no function: {module!r} has no {name!r}")
    return found
