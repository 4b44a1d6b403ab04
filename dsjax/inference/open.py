"""A trained model to use: from a run folder, a Hugging Face folder or a GGUF file, which the verbs take alike.

trained = open_model("runs/quickstart", report=print)
generate_text(trained, [plain_prompt(trained, "def ")], options=Generation(max_new_tokens=50), show=print)  # text.py
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.finite import finite
from dsjax.checkpoint.gguf_file import is_gguf
from dsjax.checkpoint.manifest import read_json
from dsjax.checkpoint.store import CheckpointStore
from dsjax.data.config import FileTokenizer
from dsjax.data.tokenizers.chat import ChatTemplate, chat_template
from dsjax.data.tokenizers.files import vocabulary_file
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.models.adapter_training import applied, check_base, split_model
from dsjax.models.adapters import Adapter, merged
from dsjax.models.config import ModelConfig
from dsjax.models.families.build import abstract, segments_of
from dsjax.models.formats.config_json import config_from_hf, label_names
from dsjax.models.formats.peft import read_adapter
from dsjax.models.formats.pretrained import load_pretrained, open_weights
from dsjax.models.naming import abstract_named, from_named, to_named
from dsjax.models.transformer import Transformer
from dsjax.models.tree import ModelTree
from dsjax.runs.commands import resume
from dsjax.runs.folder import read_config

Kind = Literal["run", "hugging_face", "gguf"]
Report = Callable[[str], None]

_DEFAULT_LENGTH = 1024
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer.

    Attributes:
        model: with float32 parameters on the first device.
        tokenizer: its ids are all rows of the embedding.
        kind: what the folder or file is.
        path: the folder or file.
        what: which parameters of it these are, in words.
        step: steps they were trained for; None if the folder does not say.
        trained_length: tokens in a row of its training, or as many as it has positions; 1024 if nobody knows.
        stop_tokens: ids that end a text.
        chat: the template of its conversations; None if it has none.
        labels: names of the classes of the task classification; () of another task.
        adapter: what LoRA learned, which is merged into the model already; None if nothing was.
    """

    model: Transformer
    tokenizer: Tokenizer
    kind: Kind
    path: Path
    what: str
    step: int | None
    trained_length: int
    stop_tokens: frozenset[int]
    chat: ChatTemplate | None = None
    labels: tuple[str, ...] = ()
    adapter: Adapter | None = None


def kind_of(path: str | Path) -> Kind:
    """The kind of a path: a run (config.yaml), a Hugging Face model (config.json, weights) or a GGUF file.

    Raises:
        ValueError: there is nothing, or nothing of these.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"there is no folder {str(path)!r}; give a run folder or a Hugging Face model folder, or a GGUF file"
        )
    if is_gguf(path):
        return "gguf"
    if not path.is_dir():
        raise ValueError(f"{path} is a file, but no GGUF file; give one, or the folder of a run or Hugging Face model")
    if (path / "config.yaml").is_file():
        return "run"
    if (path / "config.json").is_file() or any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        return "hugging_face"
    names = sorted(file.name for file in path.iterdir())
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise ValueError(
        f"{path} is neither a run folder (no config.yaml in it) nor a Hugging Face folder (no config.json, no "
        f"model.safetensors); it holds {found}"
    )


def open_model(path: str | Path, *, report: Report) -> TrainedModel:
    """The model of a run folder (its newest whole checkpoint), of a Hugging Face folder, or of a GGUF file.

    Of a run that kept an average of the parameters (train.ema_decay) the average is taken. A checkpoint is read
    through and compared with its manifest before it is used.

    Args:
        path: the folder or file.
        report: told of each damaged checkpoint that is passed over, and of ids that are those of an older version.

    Raises:
        ValueError: none of these, no whole checkpoint, tensors or a tokenizer that are missing or do not fit.
    """
    path = Path(path)
    return _open_run(path, report) if (kind := kind_of(path)) == "run" else _open_pretrained(path, kind)


def with_adapter(trained: TrainedModel, path: str | Path) -> TrainedModel:
    """The model with an adapter in PEFT's format merged into it; `trained` stays as it is.

    Raises:
        ValueError: no adapter there, or one for another model.
    """
    config = trained.model.config
    adapter = read_adapter(path, config)
    params = merged(nnx.to_pure_dict(nnx.state(trained.model, nnx.Param)), adapter, segments_of(config))
    model = nnx.merge(nnx.graphdef(trained.model), params)
    return dataclasses.replace(trained, model=model, adapter=adapter, what=f"{trained.what} with the adapter {path}")


def _open_run(path: Path, report: Report) -> TrainedModel:
    config = read_config(path)
    tokenizer = Tokenizer.load(path / "tokenizer")
    if tokenizer.missing_tokens:
        report(
            f"{path} was trained without the {tokenizer.missing_tokens} that its tokenizer puts around a text, as "
            "texts were then; it is prompted and scored so as well"
        )
    _check_vocabulary(path, config.model, tokenizer)
    tree = "ema" if config.train.ema_decay > 0 else "params"
    # Layers apart, as in every model that is used and not trained: see `load_pretrained`.
    shape = dataclasses.replace(config.model, segments=(1,) * config.model.num_layers)
    trees, adapter = split_model(shape, config.lora)[0], None
    step, params = _restore(path / "checkpoints", trees, tree, report)
    if config.lora is not None:
        check_base(path, shape)
        tensors = {name: np.asarray(value) for name, value in to_named(params, segments_of(shape)).items()}
        params, adapter = applied(shape, config.lora, tensors)
    model = nnx.merge(nnx.graphdef(abstract(shape)), params)
    averaged = ", averaged over the last steps (train.ema_decay)" if tree == "ema" else ""
    return TrainedModel(
        model=model,
        tokenizer=tokenizer,
        kind="run",
        path=path,
        what=f"step {step} of the run {path}{averaged}",
        step=step,
        trained_length=config.data.sequence_length,
        stop_tokens=frozenset({tokenizer.end_of_text}),
        chat=chat_template(tokenizer.settings, str(path)),
        labels=_run_labels(path, config.model),
        adapter=adapter,
    )


def _restore(directory: Path, model: ModelTree, tree: str, report: Report) -> tuple[int, dict[str, Any]]:
    """The newest whole checkpoint's step and one of its trees of parameters; the rest stays unread."""
    store = CheckpointStore(directory, CheckpointConfig())
    step = store.latest_good(lambda problem: report(f"passed over: {problem}"))
    if step is None:
        why = f"none of the checkpoints {store.steps()} is whole" if store.steps() else "it holds no whole checkpoint"
        raise ValueError(f"{directory}: {why}; train on by {resume(directory.parent)}, or give another run")
    one_device = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("device",)), PartitionSpec())
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device)
    asked = {tree: jax.tree.map(place, model.shapes)}
    restored = store.restore(step, abstract_named(asked, model.segments), partial=True)

    def take(name: str) -> jax.Array:
        array = restored.pop(name)
        finite(np.asarray(array), name, where=f"step {step} in {directory}")
        return array

    return step, from_named(take, asked, model.segments)[tree]


def _open_pretrained(path: Path, kind: Kind) -> TrainedModel:
    weights = open_weights(path)
    config = config_from_hf(weights.config)
    if path.is_dir() and vocabulary_file(path) == path:
        raise ValueError(
            f"{path} has no tokenizer.json, without which text cannot be read or written; put the model's own there "
            "(where transformers is installed: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
        )
    tokenizer = load_tokenizer(FileTokenizer(path=str(path)))
    _check_vocabulary(path, config, tokenizer)
    model = load_pretrained(path)
    length = model.architecture.max_positions or weights.config.get("seq_length")
    return TrainedModel(
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        path=path,
        what=f"the {'GGUF file' if kind == 'gguf' else 'Hugging Face folder'} {path}",
        step=None,
        trained_length=length if isinstance(length, int) and length > 1 else _DEFAULT_LENGTH,
        stop_tokens=frozenset({tokenizer.end_of_text, *_end_ids(weights.config), *_end_ids(_generation_config(path))}),
        chat=chat_template(tokenizer.settings, str(path)),
        labels=label_names(weights.config, config) if config.task == "classification" else (),
    )


def _run_labels(path: Path, config: ModelConfig) -> tuple[str, ...]:
    """The names in a run's data.json, then numbers for classes that no text had."""
    if config.task != "classification":
        return ()
    names = read_json(path / "data.json").get("labels", []) if (path / "data.json").is_file() else []
    return (*names, *(str(number) for number in range(len(names), config.num_labels)))


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def _end_ids(config) -> list[int]:
    """eos_token_id: absent, one id, or several."""
    value = config.get("eos_token_id")
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]


def _check_vocabulary(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, but the model has only "
            f"{config.vocab_size} embeddings; this is not the model's own tokenizer"
        )
