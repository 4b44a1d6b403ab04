"""The code of a family, as one value: the module named in the registry has it as FAMILY."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.checkpoint.settings import Settings
from dsjax.checkpoint.tensor_map import Entry, Unread
from dsjax.models.config import ModelConfig
from dsjax.models.families.config import Task
from dsjax.models.families.registry import FAMILIES
from dsjax.models.model import Description, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace[Config]:
    """A family's folders on Hugging Face.

    Attributes:
        classes: names of transformers' classes -> our task; the first is what a config.json without a class means.
        prefix: before the names of the tensors of classes that have a head.
        kernels_in_first: kernels of layers are stored as [in, out] (Conv1D), not as [out, in].
        free: keys of config.json that change no number, each with the reason.
        fixed: keys that are refused unless they have one of these values.
        from_hf: the settings in a config.json -> our config.
        to_hf: our config -> config.json, without the class.
        entries: our tensors and theirs.
        unread: tensors that a folder may have besides.
        dropouts: keys of config.json for rates that are one here, `dropout`, with transformers' defaults; None is the
            rate of the others.
    """

    classes: Mapping[str, Task]
    prefix: str
    kernels_in_first: bool = False
    free: dict[str, str]
    fixed: dict[str, tuple[Any, ...]]
    from_hf: Callable[[Settings], Config]
    to_hf: Callable[[Config], dict[str, Any]]
    entries: Callable[[Config], tuple[Entry, ...]]
    unread: Callable[[Config], tuple[Unread, ...]]
    dropouts: Callable[[Task], Mapping[str, float | None]]

    def prefix_for(self, task: Task) -> str:
        """The prefix in folders of a task: classes without a head have no model inside them to give its name."""
        return "" if task == "embedding" else self.prefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family[Config]:
    """All code of a family.

    Attributes:
        tasks: what its models can be made for.
        architecture: a config -> what is known of the model without building it.
        build: (config, architecture, key=) -> the model with fresh parameters; the architecture may be that of the
            part that one device of `tensor` computes.
        hugging_face: its folders; None where there are none.
    """

    tasks: tuple[Task, ...]
    architecture: Callable[[Config], Description]
    build: Callable[..., Model]
    hugging_face: HuggingFace[Config] | None = None


def family_of(kind: str) -> Family[Any]:
    """The code of a registered family; its module is imported now.

    Example:
        >>> family_of("gpt2").tasks
        ('language_model', 'classification')
    """
    return importlib.import_module(FAMILIES[kind].module).FAMILY


def architecture_of(config: ModelConfig) -> Description:
    """All that is known of a model without building it.

    Example:
        >>> from dsjax.models.families.bert.config import BertConfig
        >>> architecture_of(BertConfig()).causal
        False
    """
    return family_of(config.kind).architecture(config)


def folders_of(config: ModelConfig) -> HuggingFace[Any]:
    """The Hugging Face folders of a config's family.

    Raises:
        ValueError: it has none.
    """
    folders = family_of(config.kind).hugging_face
    if folders is None:
        raise ValueError(f"a {config.kind} model has no form as a Hugging Face folder; use the run folder")
    return folders
