"""`dsjax convert SRC DST`: between a run folder, a Hugging Face folder and, read only, a GGUF file."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsjax.config.run import RunConfig
    from dsjax.train.source import TrainedModel

HELP = "between a run folder, a Hugging Face folder and a GGUF file"

_DESCRIPTION = """\
Write the model of a run or of a GGUF file as a Hugging Face folder (float32, with its tokenizer),
or a Hugging Face folder (with --config also a GGUF file) as a run that generates, evaluates, and is
trained on by `dsjax train DST/config.yaml --run-dir DST --resume`. Nothing is ever overwritten."""

_EPILOG = """\
  dsjax convert runs/quickstart quickstart-hf
  dsjax convert model.gguf model-hf
  dsjax convert bloom-560m runs/tuned --config my.yaml --set train.steps=500"""

# Model settings that decide no tensor: a run file's own are kept, where it or --set gives them.
_FREE = ("dropout", "attention_dropout", "compute_dtype", "remat")
_DEFAULT_STEPS = 1000
_MAX_DEFAULT_LENGTH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("source", metavar="SRC", help="a run folder, a Hugging Face model folder or a GGUF file")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist or is empty")
    parser.add_argument("--config", metavar="RUN", help="a run file: the data and the training of the new run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="sets", help="override its values")
    parser.add_argument("--adapter", action="store_true", help="of a run with lora: its adapter alone, as PEFT has it")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written and what may be done with it."""
    import json
    import sys
    from pathlib import Path

    from dsjax.checkpoint.store import CheckpointError
    from dsjax.cli.main import UserError
    from dsjax.train.convert import refuse_overwriting
    from dsjax.train.processes import use_compilation_cache
    from dsjax.train.source import kind_of, open_model

    source, destination = Path(arguments.source), Path(arguments.destination)
    kind = kind_of(source)
    if kind == "run" and (arguments.config or arguments.sets):
        raise ValueError(f"--config and --set describe a new run, but {source} is a run and becomes a model folder")
    if arguments.sets and not arguments.config:
        raise ValueError("--set changes values of a run file: give one with --config")
    refuse_overwriting(destination)
    use_compilation_cache()
    trained = open_model(source, report=lambda line: print(f"dsjax: {line}", file=sys.stderr))
    try:
        if arguments.adapter:
            result = _to_adapter(trained, destination)
        elif kind == "run" or (kind == "gguf" and not arguments.config):
            result = _to_hugging_face(trained, destination)
        else:
            result = _to_run(trained, arguments, destination)
    except (CheckpointError, OSError) as error:
        raise UserError(f"cannot write {destination}: {error}") from error
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{destination}: {result['parameters']:,} parameters, from {trained.what}")
    for line in result["next"]:
        print(f"  {line}")
    return 0


def _to_hugging_face(trained: "TrainedModel", destination) -> dict:
    from dsjax.train.convert import to_hugging_face

    to_hugging_face(trained, destination)
    return _result(trained, destination, "hugging_face", [f"dsjax generate {destination} --prompt TEXT"])


def _to_adapter(trained: "TrainedModel", destination) -> dict:
    from dsjax.models.peft import write_adapter

    if trained.adapter is None:
        raise ValueError(f"--adapter: {trained.path} is not a run with lora; leave --adapter out for the whole model")
    config = trained.model.config
    write_adapter(trained.adapter, destination, config=config, base=config.init_from)
    commands = [f"dsjax generate {config.init_from} --adapter {destination} --prompt TEXT"]
    parameters = sum(tensor.size for tensor in trained.adapter.tensors.values())
    return _result(trained, destination, "adapter", commands) | {"parameters": parameters}


def _to_run(trained: "TrainedModel", arguments: argparse.Namespace, destination) -> dict:
    from dsjax.config.load import to_yaml
    from dsjax.data.build import build_corpus
    from dsjax.train.convert import RunSettings, to_run
    from dsjax.train.folder import resolved

    config = resolved(_run_config(trained, arguments, destination))
    if config.lora is not None:
        raise ValueError("a run with lora keeps only adapters: start it by dsjax train, with model.init_from")
    # Built now: a run keeps its data's hash, and data that cannot be read is better found before than after.
    corpus = build_corpus(config.data, progress=not arguments.json)
    config = resolved(_with_tokenizer(config, str((destination / "tokenizer").absolute())))
    settings = RunSettings(
        config_yaml=to_yaml(config),
        model=config.model,
        optimizer=config.optimizer,
        ema=config.train.ema_decay > 0,
        seed=config.seed,
        data_hash=corpus.hash,
    )
    to_run(trained, destination, settings)
    commands = [
        f"dsjax generate {destination} --prompt TEXT",
        f"dsjax train {destination / 'config.yaml'} --run-dir {destination} --resume",
    ]
    return _result(trained, destination, "run", commands)


def _result(trained: "TrainedModel", destination, kind: str, commands: list[str]) -> dict:
    import jax
    from flax import nnx

    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(trained.model, nnx.Param)))
    return {
        "source": trained.what,
        "destination": str(destination),
        "kind": kind,
        "parameters": parameters,
        "next": commands,
    }


def _run_config(trained: "TrainedModel", arguments: argparse.Namespace, destination) -> "RunConfig":
    """The new run's config: the model and the tokenizer are the folder's, the rest is the run file's or the default.

    Raises:
        ValueError: the run file is wrong, or has longer rows than the model has positions.
    """
    import dataclasses

    from dsjax.config.load import load_with_origins, to_dict
    from dsjax.config.run import RunConfig
    from dsjax.data.config import DataConfig
    from dsjax.train.config import TrainConfig

    limit = trained.model.architecture.max_positions
    if arguments.config:
        config, origins = load_with_origins(arguments.config, arguments.sets)
        if limit and config.data.sequence_length > limit:
            raise ValueError(
                f"data.sequence_length is {config.data.sequence_length}, but the model has {limit} positions; "
                f"--set data.sequence_length={limit}"
            )
        given = {name for name in _FREE if origins.get(f"model.{name}", "default") != "default"}
        free = {name: value for name, value in to_dict(config.model).items() if name in given}
    else:
        length = min(_MAX_DEFAULT_LENGTH, trained.trained_length)
        train, data = TrainConfig(steps=_DEFAULT_STEPS), DataConfig(sequence_length=length)
        config, free = RunConfig(name=destination.name, train=train, data=data), {}
    model = dataclasses.replace(trained.model.config, **free)
    return _with_tokenizer(dataclasses.replace(config, model=model), str(trained.path))


def _with_tokenizer(config: "RunConfig", folder: str) -> "RunConfig":
    import dataclasses

    from dsjax.data.config import FileTokenizer

    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=FileTokenizer(path=folder)))
