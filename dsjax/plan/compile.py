"""Compiles a run's two programs for virtual CPU devices, in a process of its own: `python -m dsjax.plan.compile`.

Reads {"config": ..., "devices": N} from standard input and writes one JSON object: bytes by `memory_analysis()`,
collectives counted in the compiled text, seconds. Nothing is run and no array is made, so BLOOM-176B on 384 devices
compiles on a laptop. The figures are XLA:CPU's: it widens bfloat16, fuses less than XLA:GPU and copies operands that a
GPU reads as they are.
"""

import json
import subprocess
import sys
import time
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsjax.collectives.hlo import count_collectives, table, total_bytes
from dsjax.config.load import from_dict, to_dict
from dsjax.config.run import RunConfig
from dsjax.data.rows.formats import row_format
from dsjax.plan.trace import batch_shapes
from dsjax.setup.assembly import Setup, assemble
from dsjax.setup.state import is_spec
from dsjax.setup.step import BATCH_SPEC, GradientInputs


def lower_programs(setup: Setup) -> dict[str, Any]:
    """The gradient and the first stage's update, lowered from shapes alone: name -> jax.stages.Lowered."""
    layout, model, optimizer, state = setup.layout, setup.model, setup.optimizer, setup.shapes
    programs, train = setup.programs, setup.config.train
    workers, row = layout.mesh.shape["data"], row_format(setup.config.data)
    shapes = batch_shapes(row, train.batch_size, workers=workers, accumulation=train.accumulation)
    rows = layout.named(BATCH_SPEC)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in shapes.items()}
    placed = lambda shapes, specs: jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.named(spec)), shapes, specs
    )
    frozen = setup.frozen
    untrained = None if frozen is None else placed(frozen.shapes, frozen.specs(layout.parameter))
    inputs = GradientInputs(state.params, state.key, state.step, batch, untrained)  # pyright: ignore
    gradient = programs.gradient.lower(inputs)
    shapes, metrics = jax.eval_shape(programs.gradient, inputs)
    specs = model.specs(layout.gradient)
    if optimizer.gradients == "per_worker":
        specs = jax.tree.map(lambda s: PartitionSpec("data", *s), specs, is_leaf=is_spec)
    scalar = metrics["loss"]
    update = programs.updates[optimizer.stage(0, None)].lower(state, placed(shapes, specs), scalar, scalar)
    return {"gradient": gradient, "update": update}


def measure(lowered: Any, axis_sizes: dict[str, int]) -> dict[str, Any]:
    """Compile one program: its bytes on one device, its collectives, the seconds it took."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    collectives = count_collectives(compiled.as_text(), axis_sizes)
    return {
        "seconds": seconds,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "collectives": [list(row) for row in table(collectives)],
        "axes": {axis: total_bytes(collectives, axis=axis) for axis, size in axis_sizes.items() if size > 1},
    }


def compile_in_child(config: RunConfig, *, num_devices: int) -> dict[str, Any]:
    """Measure both programs in a child process with that many virtual CPU devices.

    Raises:
        ValueError: the programs did not compile; with the end of what the child said.
    """
    order = json.dumps({"config": to_dict(config), "devices": num_devices})
    command = [sys.executable, "-m", "dsjax.plan.compile"]
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ValueError(
            f"compiling for {num_devices} virtual CPU devices failed (exit code {done.returncode}):\n{end}"
        )
    return json.loads(done.stdout)


def main() -> None:
    """The child."""
    order = json.load(sys.stdin)
    config = from_dict(RunConfig, order["config"])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", order["devices"])
    setup = assemble(config)
    sizes = dict(setup.layout.mesh.shape)
    json.dump({name: measure(program, sizes) for name, program in lower_programs(setup).items()}, sys.stdout)


if __name__ == "__main__":
    main()
