"""A run's config with all that its weights decide spelt out, and the schedule that follows from it."""

import dataclasses

from dsjax.config.run import ResolvedRunConfig, RunConfig
from dsjax.data.config import BPETokenizer, TokensSource
from dsjax.models.families.build import segments_of
from dsjax.models.formats.pretrained import resolve
from dsjax.models.stack import check_dropping
from dsjax.objectives.registry import chosen_objective
from dsjax.setup.schedule import StepSchedule, make_schedule


def resolved(config: RunConfig) -> ResolvedRunConfig:
    """The config with the architecture of existing weights in place of `kind: pretrained`, and what rows are for.

    A freeze that is given as a share of the run becomes the step that it is, so that the variance of a run that is
    continued for longer stays frozen.

    The model decides what its rows are for (model.task, and whether it sees both sides), so data.task follows it: two
    settings could only contradict each other.

    Raises:
        ValueError: the weights cannot be read, the family lacks the task, other settings contradict the task, or the
            curriculum or random-LTD do not fit data and model.
    """
    if isinstance(config, ResolvedRunConfig):
        return config
    model = resolve(config.model)
    task = chosen_objective(model, config.data.task).name
    if config.sample.prompt and task != "language_model":
        raise ValueError(f"sample.prompt needs a model that predicts the next token; this one's task is {task}")
    trained_anew = isinstance(config.data.tokenizer, BPETokenizer) and not any(
        isinstance(source, TokensSource) for source in config.data.sources
    )
    if model.init_from and trained_anew:
        raise ValueError(
            "model.init_from needs the tokenizer that its weights were made with, but data.tokenizer is of kind bpe, "
            f"which is trained anew; set data.tokenizer to {{kind: file, path: {model.init_from}}}"
        )
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    data = dataclasses.replace(config.data, task=task)
    settled = ResolvedRunConfig(**{**values, "model": model, "data": data})
    # Told here, before any text is read: by `plan` as by `train`.
    if config.curriculum is not None:
        # Not above: it needs the packages that read data, and experiments/gpu_check assembles without them.
        from dsjax.data.curriculum.draw import check_curriculum

        check_curriculum(config.curriculum, data)
    if config.random_ltd is not None:
        check_dropping(segments_of(model), config.random_ltd.layers(model.num_layers))
    return dataclasses.replace(settled, optimizer=config.optimizer.frozen_at(schedule_of(settled).num_steps))


def schedule_of(config: ResolvedRunConfig) -> StepSchedule:
    """Lengths, kept tokens and clocks of every step of a run.

    Raises:
        ValueError: lengths or kept tokens that its rows or its model do not have.
    """
    return make_schedule(
        config.train,
        config.curriculum,
        config.random_ltd,
        sequence_length=config.data.sequence_length,
        num_layers=config.model.num_layers,
    )
