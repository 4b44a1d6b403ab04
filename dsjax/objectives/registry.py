"""The objectives that there are, by name, and which of them train a model."""

from dsjax.models.config import ModelConfig
from dsjax.models.families.family import family_of
from dsjax.objectives.api import Objective
from dsjax.objectives.labels import Labels
from dsjax.objectives.language_model import LanguageModel
from dsjax.objectives.masked_words import MaskedWords

OBJECTIVES: dict[str, Objective] = {one.name: one for one in (LanguageModel(), MaskedWords(), Labels())}


def objective_of(name: str) -> Objective:
    """The objective of a resolved run, by data.task.

    Example:
        >>> objective_of("classification").targets
        'labels'
    """
    return OBJECTIVES[name]


def objectives_for(config: ModelConfig) -> dict[str, Objective]:
    """The objectives that train a model, by name.

    Example:
        >>> from dsjax.models.families.bert.config import BertConfig
        >>> list(objectives_for(BertConfig())), list(objectives_for(BertConfig(task="embedding")))
        (['masked'], [])
    """
    return {name: one for name, one in OBJECTIVES.items() if one.trains(config)}


def chosen_objective(config: ModelConfig, asked: str = "from_model") -> Objective:
    """The objective of a run by data.task; `from_model` takes the first that trains the model.

    Raises:
        ValueError: the family lacks the model's task, nothing here trains it, or not what was asked for.

    Example:
        >>> from dsjax.models.families.bert.config import BertConfig
        >>> chosen_objective(BertConfig()).name, chosen_objective(BertConfig(task="classification")).name
        ('masked', 'classification')
    """
    known = sorted({*family_of(config.kind).tasks} - {"embedding"})
    found = objectives_for(config) if config.task in known else {}
    if not found:
        raise ValueError(
            f"a {config.kind} model cannot be trained for model.task = {config.task}; it can for {', '.join(known)}"
        )
    if asked not in ("from_model", *found):
        raise ValueError(
            f"data.task is {asked}, but a {config.kind} model of the task {config.task} learns from rows of the task "
            f"{' or '.join(found)}; leave data.task out"
        )
    objective = found[next(iter(found)) if asked == "from_model" else asked]
    objective.check(config)
    return objective
