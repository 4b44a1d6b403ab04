"""`dsjax train CONFIG`: train a model."""

import argparse
import errno
import json
import os
import sys
import traceback
from typing import NoReturn

HELP = "train a model from a config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a YAML file, such as configs/run/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="sets", help="override a value")
    parser.add_argument("--run-dir", metavar="DIR", help="where to write; default: the next free runs/NAME")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    group.add_argument("--resume-if-any", action="store_true", help="the same, or start if there is none")
    parser.add_argument("--profile", metavar="START:STOP", help="write a trace of these steps")
    parser.add_argument("--force", action="store_true", help="run although the plan finds not enough memory")
    parser.add_argument("--distributed", action="store_true", help="find the cluster's other processes (SLURM, MPI)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON at the end")


def run(arguments: argparse.Namespace) -> int:
    """Train; exit code 75 if a signal stopped the run and it can be resumed, 1 if something at its end failed."""
    from dsjax.mesh.processes import num_processes

    try:
        return _train(arguments)
    except BaseException as error:
        if num_processes() > 1:
            _leave(error)
        raise


def _leave(error: BaseException) -> NoReturn:
    """End one process of several at once: JAX would wait at exit for the others, which may be waiting for this one."""
    from dsjax.cli.main import report

    try:
        code = report(error)
    except BaseException:  # a bug
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also when their reader has gone
        os._exit(code)


def _train(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from dsjax.checkpoint.store import CheckpointError
    from dsjax.cli.main import Failure, message_of
    from dsjax.config.load import load_run
    from dsjax.train.loop import run as train
    from dsjax.train.recorder import NonFiniteError
    from dsjax.train.signals import EXIT_STOPPED

    sets = arguments.sets + ([f"observe.profile={arguments.profile}"] if arguments.profile else [])
    config = load_run(arguments.config, sets)
    try:
        result = train(
            config,
            run_dir=arguments.run_dir,
            resume="must" if arguments.resume else "if_any" if arguments.resume_if_any else "no",
            force=arguments.force,
            distributed=arguments.distributed,
            console=Console(file=sys.stderr, highlight=False) if arguments.json else None,
        )
    except (CheckpointError, NonFiniteError) as error:
        raise Failure(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = message_of(error) if error.filename else error.strerror
        raise Failure(f"{reason}; the checkpoints are intact: make room, then go on with --resume") from error
    if result.stopped_by:
        return EXIT_STOPPED
    if arguments.json:
        print(json.dumps({"folder": str(result.folder), **result.summary}))
    return 1 if result.failures else 0
