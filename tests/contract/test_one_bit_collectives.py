"""Bytes sent in every stage of 1-bit optimizers, counted from the compiled programs of `dsjax train`.

Over `data`, W workers; of one device: g bytes of its gradients, N its values padded to 8 W in each tensor, R tensors
(layers of a stack one by one), M = N / 8 + 4 R W the bytes of a message:

    gradient      loss and number of tokens, 4 bytes each; where workers are alone, nothing
    full          g, float32
    compressed    M in an all-to-all, M in an all-gather (between two workers both are sums of M / 2 bytes), and two
                  floats of each worker
    sync          the same two messages, and a sum of two floats
    local         nothing
Over the other axes go sums, a float for each tensor, and below ZeRO 3 the gather of changed parameters.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.collectives.hlo import Collective, count_collectives
from dsjax.mesh.config import MeshConfig
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.optimizers.kinds.onebit_adam import OneBitAdamConfig
from dsjax.optimizers.kinds.onebit_lamb import OneBitLambConfig
from dsjax.optimizers.kinds.zero_one_adam import ZeroOneAdamConfig
from dsjax.plan.rounds import Round, predict_rounds
from tests.helpers import FAST, Training, make_rows, make_training

SMALL = LlamaConfig(
    vocab_size=64, num_layers=2, model_dim=40, num_heads=4, mlp_dim=64, tied_embedding=True, segments=(2,)
)
ONLY = ("embed.table", "out.kernel", "norm.scale")
"""What is trained of it, or compiling takes long: a table, a stack of matrices, and norms, of which the 40 values are
no multiple of 8 W, alone and as stacks."""
MESHES = {
    "data": MeshConfig(data=4),
    "tensor": MeshConfig(data=2, tensor=2, zero_stage=0),
    "zero3": MeshConfig(data=2, fsdp=2, zero_stage=3),
    "zero1": MeshConfig(data=2, fsdp=2, zero_stage=1),
}
STEPS = 12
ZERO_ONE = ZeroOneAdamConfig(var_freeze_step=4, var_update_scaler=1, local_step_scaler=1, local_step_clipper=4)
ADAM, LAMB = OneBitAdamConfig(freeze_step=3), OneBitLambConfig(freeze_step=3)
LOSS_AND_TOKENS = [("all-reduce", "f32", 4), ("all-reduce", "s32", 4)]
CASES = [
    *[(mesh, ZERO_ONE, stage) for mesh in ("data", "tensor", "zero3") for stage in ("full", "compressed", "sync")],
    *[(mesh, ZERO_ONE, "local") for mesh in ("data", "tensor", "zero3")],
    ("zero1", ADAM, "compressed"),
    ("tensor", LAMB, "compressed"),
]


def counted(program: Any, *arguments: Any, sizes: Mapping[str, int]) -> list[Collective]:
    return count_collectives(program.lower(*arguments).compile(compiler_options=FAST).as_text(), dict(sizes))


def update_collectives(training: Training, stage: str) -> list[Collective]:
    """What a stage's update sends."""
    layout, model, workers = training.layout, training.model, training.layout.mesh.shape["data"]
    shape = lambda dims, *spec: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=layout.named(P(*spec)))
    gradients = jax.tree.map(
        lambda x, spec: shape((workers, *x.shape), "data", *spec), model.shapes, model.specs(layout.gradient)
    )
    loss = shape((workers,), "data") if stage in training.optimizer.local else shape(())
    state = training.setup.shapes
    program = training.programs.updates[stage]
    return counted(program, state, gradients, loss, jnp.float32(1), sizes=layout.mesh.shape)


def device_sizes(training: Training) -> list[tuple[int, int]]:
    """Layers, and values of one layer that a device holds, of every tensor as the optimizer cuts it."""
    layout, model = training.layout, training.model
    specs = jax.tree.leaves(model.specs(layout.optimizer), is_leaf=lambda leaf: isinstance(leaf, P))
    found = []
    for x, spec, first in zip(jax.tree.leaves(model.shapes), specs, jax.tree.leaves(model.leading), strict=True):
        shape = layout.named(spec).shard_shape(x.shape)
        found.append((math.prod(shape[:first]), math.prod(shape[first:])))
    return found


def planned_rounds(training: Training) -> dict[str, Round]:
    """What `dsjax plan` says of the stages."""
    return {one.stage: one for one in predict_rounds(training.setup)}


def over_data(collectives) -> list[tuple[str, str, int]]:
    assert all(one.axes == ("data",) and one.count == 1 for one in collectives if "data" in one.axes)
    return sorted((one.kind, one.dtype, one.bytes) for one in collectives if "data" in one.axes)


def sent(found: list[tuple[str, str, int]], workers: int) -> float:
    """Bytes that a device sends: (W - 1) / W of a buffer, twice that in an all-reduce."""
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, _, size in found) * (workers - 1) / workers


@pytest.mark.parametrize(("mesh", "optimizer", "stage"), CASES, ids=lambda x: x if isinstance(x, str) else x.kind)
def test_a_stage_sends_what_is_accounted_for(mesh, optimizer, stage):
    training = make_training(MESHES[mesh], SMALL, optimizer, steps=STEPS, only=ONLY)
    workers, sizes = MESHES[mesh].data, device_sizes(training)
    values = sum(layers * n for layers, n in sizes)
    padded = sum(layers * (-(-n // (8 * workers)) * 8 * workers) for layers, n in sizes)
    tensors = sum(layers for layers, _ in sizes)
    message = padded // 8 + 4 * tensors * workers
    assert padded > values
    bits = [("all-to-all", "u8", message), ("all-gather", "u8", message)]
    if workers == 2:
        bits = [("all-reduce", "u8", message // 2)] * 2
    wanted = {
        "full": [("all-reduce", "f32", 4 * values)],
        "compressed": [("all-gather", "f32", 8 * workers), *bits],
        "sync": [("all-reduce", "f32", 8), *bits],
        "local": [],
    }[stage]
    collectives = update_collectives(training, stage)
    assert over_data(collectives) == sorted(wanted)
    wanted += [] if stage in ("sync", "local") else LOSS_AND_TOKENS
    planned = planned_rounds(training)[stage]
    assert (planned.buffers, planned.sent) == (sum(size for _, _, size in wanted), sent(wanted, workers))
    # Figures for each tensor: its square, to clip by; of the message the squares and counts, and those of the server's
    # part; of LAMB the norms of the direction with and without decay, and F.
    metrics = {"full": 1, "compressed": 4, "sync": 4, "local": 1}[stage] + (3 if optimizer is LAMB else 0)
    others: collections.Counter[str] = collections.Counter()
    for one in collectives:
        if "data" not in one.axes:
            others[f"{one.kind} {one.dtype} {'+'.join(one.axes)}"] += one.total_bytes
    axis = {"data": "", "tensor": "tensor"}.get(mesh, "fsdp")
    small = {f"all-reduce f32 {axis}": 4 * tensors * metrics} if axis else {}
    whole = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(training.model.shapes))
    assert others == small | ({"all-gather f32 fsdp": whole} if mesh == "zero1" else {})


@pytest.mark.parametrize("mesh", ["data", "tensor", "zero3"])
def test_a_gradient_of_workers_that_are_alone_sends_nothing_over_data(mesh):
    training = make_training(MESHES[mesh], SMALL, ZERO_ONE, steps=STEPS)
    state = training.setup.shapes
    inputs = training.programs.gradient_inputs(training.optimizer, "local", state, training.place(make_rows()))
    assert training.programs.local is not None and inputs.shift is not None
    found = counted(training.programs.local, inputs, sizes=training.layout.mesh.shape)
    assert over_data(found) == []
