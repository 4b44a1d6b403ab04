"""The training step on a GPU: cuDNN's attention in its program, and what crosses between two workers."""

import math

import jax
import jax.numpy as jnp
import yaml
from gpu import HERE as PRETRAINING
from gpu import LARGEST_LOSS_DIFFERENCE
from item import Context, Outcome
from jax.experimental import topologies
from jax_worker import JaxTrainer
from protocol import Job
from run import write_inputs

from dsjax.collectives.hlo import count_collectives
from dsjax.config.run import RunConfig
from dsjax.data.config import DataConfig
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.tree import count_parameters
from dsjax.setup.assembly import Setup, assemble
from dsjax.setup.config import TrainConfig
from dsjax.setup.step import BATCH_SPEC, GradientInputs

STEPS = 3
FIGURES = 4096
"""Bytes of losses, counts and norms: small beside any gradient."""


def cudnn(context: Context) -> Outcome:
    """A few steps in bfloat16 beside the same in float32, which takes XLA's attention."""
    config = yaml.safe_load((PRETRAINING / "config.yaml").read_text())
    folder = context.work / "step"
    folder.mkdir(parents=True, exist_ok=True)
    losses, calls = {}, 0
    for dtype in ("bfloat16", "float32"):
        job = Job(
            **config["tiny" if context.rehearse else "gpu"]["check"], optimizer=config["optimizer"],
            tokens="tokens.npy", device="cpu" if context.rehearse else "cuda", compute_dtype=dtype,
        )  # fmt: skip
        write_inputs(job, folder, batches=STEPS)
        trainer = JaxTrainer(Job(**{**vars(job), "tokens": str(folder / job.tokens)}))
        losses[dtype] = trainer.train(STEPS)
        if dtype == "bfloat16":
            calls = trainer.inspect()["cudnn_attention_calls"]
        context.note(losses=losses, cudnn_attention_calls=calls)
    pairs = zip(losses["bfloat16"], losses["float32"], strict=True)
    difference = max(abs(half - whole) / whole for half, whole in pairs)
    context.note(largest_relative_difference=difference)
    agree = math.isfinite(difference) and difference < LARGEST_LOSS_DIFFERENCE
    if context.rehearse:  # bfloat16 is held against float32 all the same
        return Outcome(ours=f"no cuDNN, losses to {difference:.0e}", passed=None if agree else False)
    return Outcome(ours=f"{calls} calls, losses to {difference:.0e}", passed=agree and calls > 0)


def two_devices(context: Context) -> Outcome:
    """Bytes across `data` in the gradient's program for two workers, compiled ahead of time: there need not be two.

    It is right if each message is sent once, whatever is accumulated in a loop, and all together are the gradient.
    """
    if context.rehearse:
        jax.config.update("jax_num_cpu_devices", 2)
        devices = jax.devices()
    else:
        devices = topologies.get_topology_desc("", "cuda", topology="1x1x2").devices
    layout = Layout(make_mesh(MeshConfig(data=2), devices=devices))
    config = GPT2Config(
        vocab_size=512, num_layers=4, model_dim=256, num_heads=4, max_positions=512, compute_dtype="bfloat16"
    )
    data, train = DataConfig(sequence_length=64 if context.rehearse else 512), TrainConfig(steps=1, clip_norm=0.0)
    setup = assemble(RunConfig(model=config, data=data, train=train), layout=layout)
    text = gradient_text(setup)
    crossing = [each for each in count_collectives(text, dict(layout.mesh.shape)) if "data" in each.axes]
    total, gradient = sum(each.total_bytes for each in crossing), 4 * count_parameters(setup.model)
    calls = text.count("__cudnn$fmha")
    context.note(
        crossing=[f"{each.kind} {each.bytes} bytes x {each.count}" for each in crossing],
        total_bytes=total, gradient_bytes=gradient, cudnn_attention_calls=calls,
    )  # fmt: skip
    once = all(each.count == 1 for each in crossing)
    ours = f"{total / gradient:.3f} gradients, {'once' if once else 'in a loop'}, {calls} fmha"
    return Outcome(ours=ours, passed=once and gradient <= total <= gradient + FIGURES)


def gradient_text(setup: Setup) -> str:
    """The compiled gradient program of 2 workers, each of which accumulates 2 parts of 2 rows."""
    state, sharding = setup.shapes, setup.layout.named(BATCH_SPEC)
    array = lambda dtype: jax.ShapeDtypeStruct((2, 2, 2, setup.config.data.sequence_length), dtype, sharding=sharding)
    batch = {"tokens": array(jnp.int32), "targets": array(jnp.int32), "loss_mask": array(jnp.bool_)}
    return setup.programs.gradient.lower(GradientInputs(state.params, state.key, state.step, batch)).compile().as_text()
