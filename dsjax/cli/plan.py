"""`dsjax plan CONFIG`: what a run would need, without running it."""

import argparse

HELP = "memory, traffic and FLOPs a run would need; touches no accelerator, allocates nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a YAML file, such as configs/run/bloom-176b.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="sets", help="override a value")
    parser.add_argument("--devices", type=int, metavar="N", help="devices of the mesh, if an axis is -1 (the rest)")
    parser.add_argument("--device", metavar="NAME", help="accelerator to fit, such as h200, h100-80g, a100-40g")
    parser.add_argument("--compile", action="store_true", help="put it through XLA on virtual CPU devices as well")
    parser.add_argument("--shardings", action="store_true", help="also list the largest tensors and how they are split")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Plan; exit code 1 if the run does not fit the device that was named or this host."""
    import dataclasses
    import json
    import math
    import os

    # Set before jax is imported: a plan must not take a GPU that is in use.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from rich.console import Console

    from dsjax.config.load import load_run
    from dsjax.mesh.report import placement_table, placements
    from dsjax.observe.devices import lookup
    from dsjax.plan.plan import plan, planned_setup
    from dsjax.plan.table import plan_table

    config = load_run(arguments.config, arguments.sets)
    device = lookup(arguments.device) if arguments.device else None
    result = plan(config, num_devices=arguments.devices, device=device)
    compiled = None
    if arguments.compile:
        from dsjax.plan.compile import compile_in_child

        compiled = compile_in_child(config, num_devices=math.prod(result.axis_sizes.values()))
    state = planned_setup(config, num_devices=arguments.devices).shapes if arguments.shardings else None
    if arguments.json:
        found = result.to_dict() | ({"compiled": compiled} if compiled else {})
        if state is not None:
            found["shardings"] = [dataclasses.asdict(row) for row in placements(state)]
        print(json.dumps(found, indent=2))
    else:
        console = Console(width=100, highlight=False)
        if state is not None:
            console.print(placement_table(state, title="State"))
        console.print(plan_table(result, compiled))
    return 1 if result.fits is False else 0
