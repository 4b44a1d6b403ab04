"""`dsjax convert SRC DST`: between a run folder, a Hugging Face folder and, read only, a GGUF file."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsjax.config.run import RunConfig
    from dsjax.inference.open import TrainedModel

    type Loaded = tuple[RunConfig, dict[str, str]]  # a run file, and where its values are from

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
    """Convert, and print the files written and the next commands."""
    import json
    import sys
    from pathlib import Path

    from dsjax.checkpoint.store import CheckpointError
    from dsjax.cli.main import UserError
    from dsjax.config.load import load_with_origins
    from dsjax.inference.convert import refuse_overwriting
    from dsjax.inference.open import kind_of, open_model
    from dsjax.mesh.processes import use_compilation_cache
    from dsjax.runs.disk import unwritable

    source, destination = Path(arguments.source), Path(arguments.destination)
    kind = kind_of(source)
    if kind == "run" and (arguments.config or arguments.sets):
        raise ValueError(f"--config and --set describe a new run, but {source} is a run and becomes a model folder")
    if arguments.sets and not arguments.config:
        raise ValueError("--set changes values of a run file: give one with --config")
    refuse_overwriting(destination)
    if problem := unwritable(destination):
        raise ValueError(f"cannot write {destination}: {problem}")
    if arguments.adapter and kind != "run":
        raise ValueError(f"--adapter: {source} is not a run with lora; leave --adapter out for the whole model")
    loaded = load_with_origins(arguments.config, arguments.sets) if arguments.config else None
    if loaded is not None and loaded[0].lora is not None:
        raise ValueError("a run with lora keeps only adapters: start it by dsjax train, with model.init_from")
    use_compilation_cache()
    trained = open_model(source, report=lambda line: print(f"dsjax: {line}", file=sys.stderr))
    try:
        if arguments.adapter:
            result = _to_adapter(trained, destination)
        elif kind == "run" or (kind == "gguf" and not arguments.config):
            result = _to_hugging_face(trained, destination)
        else:
            result = _to_run(trained, loaded, destination, quiet=arguments.json)
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
    from dsjax.inference.convert import to_hugging_face

    to_hugging_face(trained, destination)
    return _result(trained, destination, "hugging_face", _uses(trained, destination))


def _to_adapter(trained: "TrainedModel", destination) -> dict:
    from pathlib import Path

    from dsjax.models.formats.peft import write_adapter

    if trained.adapter is None:
        raise ValueError(f"--adapter: {trained.path} is not a run with lora; leave --adapter out for the whole model")
    config = trained.model.config
    write_adapter(trained.adapter, destination, config=config, base=config.init_from)
    # Only `generate` takes an adapter; other models are used with it merged, as the run's folder has it.
    commands = _uses(trained, Path(config.init_from), adapter=destination)
    if not _writes(trained):
        commands = _uses(trained, trained.path)
    parameters = sum(tensor.size for tensor in trained.adapter.tensors.values())
    return _result(trained, destination, "adapter", commands) | {"parameters": parameters}


def _to_run(trained: "TrainedModel", loaded: "Loaded | None", destination, *, quiet: bool) -> dict:
    import dataclasses
    import sys

    import jax

    from dsjax.data.corpus.build import build_corpus
    from dsjax.inference.convert import to_run
    from dsjax.mesh.build import make_mesh
    from dsjax.mesh.config import MeshConfig
    from dsjax.mesh.layout import Layout
    from dsjax.plan.preflight import check_end
    from dsjax.runs.commands import resume
    from dsjax.setup.assembly import assemble
    from dsjax.setup.resolve import resolved

    config = resolved(_run_config(trained, loaded, destination))
    check_end(config)  # or the run would be refused when it is to be trained on
    # Built now: a run keeps its data's hash, and data that cannot be read is better found before than after.
    corpus = build_corpus(config.data, progress=not quiet)
    if corpus.note:
        print(f"dsjax: {corpus.note}", file=sys.stderr)
    # That of the data: tokens that were made before have their own ends.
    trained = dataclasses.replace(trained, tokenizer=corpus.tokenizer)
    config = resolved(_with_tokenizer(config, str((destination / "tokenizer").absolute())))
    one_device = Layout(make_mesh(MeshConfig(data=1), devices=jax.devices()[:1]))
    to_run(trained, destination, assemble(config, layout=one_device), data_hash=corpus.hash)
    return _result(trained, destination, "run", [*_uses(trained, destination), resume(destination)])


def _writes(trained: "TrainedModel") -> bool:
    """Whether the model writes text from left to right."""
    return trained.model.config.task == "language_model" and trained.model.architecture.causal


def _uses(trained: "TrainedModel", source, *, adapter=None) -> list[str]:
    from dsjax.runs.commands import uses

    classifies = trained.model.config.task == "classification"
    return uses(source, writes=_writes(trained), classifies=classifies, adapter=adapter)


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


def _run_config(trained: "TrainedModel", loaded: "Loaded | None", destination) -> "RunConfig":
    """The new run's config: the model and the tokenizer are the folder's, the rest is the run file's or the default.

    Raises:
        ValueError: the run file has longer rows than the model has positions; or it leaves out a rate of dropout that
            the model's folder gives twice.
    """
    import dataclasses

    from dsjax.config.load import to_dict
    from dsjax.config.run import RunConfig
    from dsjax.data.config import DataConfig
    from dsjax.models.formats.pretrained import check_dropout, open_weights
    from dsjax.setup.config import TrainConfig

    limit = trained.model.architecture.max_positions
    if loaded is not None:
        config, origins = loaded
        if limit and config.data.sequence_length > limit:
            raise ValueError(
                f"data.sequence_length is {config.data.sequence_length}, but the model has {limit} positions; "
                f"--set data.sequence_length={limit}"
            )
        given = {name for name in _FREE if origins.get(f"model.{name}", "default") != "default"}
        free = {name: value for name, value in to_dict(config.model).items() if name in given and value is not None}
    else:
        length = min(_MAX_DEFAULT_LENGTH, trained.trained_length)
        train, data = TrainConfig(steps=_DEFAULT_STEPS), DataConfig(sequence_length=length)
        name = destination.absolute().name.lstrip(".-")[:100] or "run"
        config, free = RunConfig(name=name, train=train, data=data), {}
    model = dataclasses.replace(trained.model.config, **free)
    if "dropout" not in free:
        check_dropout(open_weights(trained.path), model)
    return _with_tokenizer(dataclasses.replace(config, model=model), str(trained.path))


def _with_tokenizer(config: "RunConfig", folder: str) -> "RunConfig":
    import dataclasses

    from dsjax.data.config import FileTokenizer

    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=FileTokenizer(path=folder)))
