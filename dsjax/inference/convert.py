"""Between a run folder and a Hugging Face folder: the same tensors, bit for bit, and what goes with them.

Hugging Face folder                       run folder
config.json, model.safetensors            config.yaml, checkpoints/step_00000000 (a whole TrainState, step 0)
tokenizer.json, tokenizer_config.json     tokenizer/
generation_config.json                    data.json, versions.json
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore
from dsjax.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer
from dsjax.inference.open import TrainedModel
from dsjax.models.formats.pretrained import write_params
from dsjax.models.naming import to_named
from dsjax.runs.counters import Counters
from dsjax.runs.folder import RunFolder, write_json
from dsjax.setup.assembly import Setup
from dsjax.setup.state import TrainState, new_state

_BYTE_FILE = "byte_tokenizer.json"


def to_hugging_face(trained: TrainedModel, path: str | Path) -> None:
    """Write a model and its tokenizer as a Hugging Face folder, all of it or nothing.

    config.json and generation_config.json name the tokens that end a text; they stand for bos and pad, too, where the
    tokenizer has none of its own. A byte tokenizer becomes the tokenizer.json that gives the same ids.

    Args:
        trained: from `open_model`.
        path: a folder that does not exist or is empty.

    Raises:
        ValueError: the folder is not empty, or the model has a shape that the family cannot express.
        OSError: the disk is full or not writable; what was written is removed.
    """
    tokenizer = trained.tokenizer
    end, stops = tokenizer.end_of_text, sorted(trained.stop_tokens)
    own = {f"{name}_token_id": tokenizer.special_id(f"{name}_token") for name in ("bos", "pad")}
    ids: dict[str, int | list[int]] = {name: end if number is None else number for name, number in own.items()}
    ids["eos_token_id"] = stops if len(stops) > 1 else end
    # Without a table of positions nothing else says how long the rows of the training were.
    length = {} if trained.model.architecture.max_positions else {"seq_length": trained.trained_length}
    labels = {"id2label": {str(number): name for number, name in enumerate(trained.labels)}} if trained.labels else {}
    labels |= {"label2id": {name: number for number, name in enumerate(trained.labels)}} if trained.labels else {}
    with _whole_or_nothing(Path(path)) as folder:
        params = nnx.to_pure_dict(nnx.state(trained.model, nnx.Param))
        write_params(params, trained.model.config, folder, extra={**ids, **length, **labels})
        write_json(folder / "generation_config.json", ids)
        trained.tokenizer.save(folder)
        if (folder / _BYTE_FILE).is_file():
            (folder / _BYTE_FILE).unlink()
            byte_tokenizer_file().save(folder)


def byte_tokenizer_file() -> Tokenizer:
    """The byte tokenizer as one of the `tokenizers` library, whose tokenizer.json others can read: equal ids.

    Example:
        >>> byte_tokenizer_file().encode("hé"), byte_tokenizer_file().end_of_text
        ([104, 195, 169], 256)
    """
    # Bytes that are visible in Latin-1 stand for themselves, the others, in order, for the characters from 256 on.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {ord(character) for character in characters if ord(character) < 256}
    hidden = iter(character for character in characters if ord(character) >= 256)
    vocabulary = {chr(value) if value in visible else next(hidden): value for value in range(256)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return Tokenizer(library)


def to_run(trained: TrainedModel, path: str | Path, setup: Setup, *, data_hash: str) -> None:
    """Write a model as a run folder with one checkpoint, at step 0, from which `dsjax train --resume` goes on.

    Args:
        trained: from `open_model`.
        path: a folder that does not exist or is empty.
        setup: the run, on one device; its model is that of `trained`.
        data_hash: of its corpus.

    Raises:
        ValueError: the folder is not empty.
        CheckpointError, OSError: the disk is full or not writable; what was written is removed.
    """
    state = _initial_state(trained, setup)
    with _whole_or_nothing(Path(path)) as folder:
        folder.mkdir()
        store = CheckpointStore(folder / "checkpoints", CheckpointConfig(asynchronous=False))
        clocks = {"counters": dataclasses.asdict(Counters()), "data_hash": data_hash}
        store.save(0, to_named(state, setup.model.segments), clocks=clocks)
        store.close()
        data = {"hash": data_hash} | ({"labels": list(trained.labels)} if trained.labels else {})
        RunFolder(folder, resumed=False, is_first_process=True).write_start(setup.config, data, trained.tokenizer.save)
        assert Tokenizer.load(folder / "tokenizer").hash == trained.tokenizer.hash, "a saved tokenizer is another one"


def _initial_state(trained: TrainedModel, setup: Setup) -> TrainState:
    """As `init_state`, from given parameters, which are not copied."""
    params = nnx.to_pure_dict(nnx.state(trained.model, nnx.Param))
    _, run_key = jax.random.split(jax.random.key(setup.config.seed))
    ema = setup.config.train.ema_decay > 0
    return jax.jit(lambda params, key: new_state(params, setup.optimizer, key, ema=ema))(params, run_key)


def refuse_overwriting(path: Path) -> None:
    """Raises ValueError unless the folder can be made there: nothing is there yet, or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; nothing is overwritten: give another place")


@contextlib.contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a folder under, which becomes `path` at the end, or is removed after an error."""
    refuse_overwriting(path)
    path = path.absolute()  # "." has no name to put something beside
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.rename(partial, path)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
