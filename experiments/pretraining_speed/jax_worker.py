"""Our side: dsjax's own model, optimizer and step programs on a mesh of one device, as `dsjax train` calls them."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import Job, commands
from side_by_side import serve

from dsjax.config.run import RunConfig
from dsjax.data.config import DataConfig
from dsjax.mesh.build import make_mesh, set_platform
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.formats.pretrained import load_pretrained
from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.setup.assembly import assemble, first_state
from dsjax.setup.config import TrainConfig
from dsjax.setup.state import TrainState
from dsjax.setup.step import BATCH_SPEC, GradientInputs


class JaxTrainer:
    """The set-up of train/loop.py, for one device and batches that lie ready."""

    def __init__(self, job: Job) -> None:
        self.job = job
        mesh_config = MeshConfig(platform="gpu" if job.device == "cuda" else "cpu")
        set_platform(mesh_config)
        layout = Layout(make_mesh(mesh_config, devices=jax.devices()[:1]))
        self.config = GPT2Config(
            vocab_size=job.vocab_size,
            num_layers=job.num_layers,
            model_dim=job.model_dim,
            num_heads=job.num_heads,
            max_positions=job.length,
            compute_dtype="bfloat16" if job.compute_dtype == "bfloat16" else "float32",
            remat="full" if job.remat == "full" else "none",
        )
        adamw = AdamWConfig(**job.optimizer)  # pyright: ignore[reportArgumentType]
        data, train = DataConfig(sequence_length=job.length), TrainConfig(steps=1, clip_norm=0.0)
        self.setup = assemble(RunConfig(model=self.config, data=data, optimizer=adamw, train=train), layout=layout)
        self.programs = self.setup.programs
        self.learning_rate = jnp.float32(adamw.learning_rate)
        self.batches = [self._place(rows) for rows in np.load(job.tokens)]
        self.reset()

    def _place(self, rows: np.ndarray) -> dict[str, jax.Array]:
        """[B, T+1] -> a batch [1, 1, B, T]."""
        arrays = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": np.ones(rows[:, 1:].shape, bool)}
        sharding = self.setup.layout.named(BATCH_SPEC)
        return {name: jax.device_put(array[None, None], sharding) for name, array in arrays.items()}

    def reset(self) -> None:
        self.state, _ = first_state(self.setup)
        if self.job.weights:
            given = nnx.to_pure_dict(nnx.state(load_pretrained(self.job.weights, segments=()), nnx.Param))
            params = jax.device_put(given, self.setup.shardings.params)
            self.state = TrainState(self.state.step, params, self.state.opt_state, self.state.key)
        self.at = 0

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            batch = self.batches[self.at % len(self.batches)]
            self.at += 1
            state = self.state
            gradients, metrics = self.programs.gradient(GradientInputs(state.params, state.key, state.step, batch))
            self.state, _ = self.programs.updates["full"](state, gradients, metrics["loss"], self.learning_rate)
            losses.append(metrics["loss"])
        jax.block_until_ready(self.state.params)
        return [float(loss) for loss in losses]

    def about(self) -> dict[str, Any]:
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
            "device": jax.devices()[0].device_kind,
            "optimizer": "AdamW, one program over the tree",
        }

    def inspect(self) -> dict[str, Any]:
        """Also how many calls of cuDNN's fused attention the compiled gradient holds (forward and backward)."""
        state = self.state
        lowered = self.programs.gradient.lower(GradientInputs(state.params, state.key, state.step, self.batches[0]))
        stats = jax.devices()[0].memory_stats() or {}
        return {
            "peak_bytes": stats.get("peak_bytes_in_use", 0),
            "cudnn_attention_calls": lowered.compile().as_text().count("__cudnn$fmha"),
        }


if __name__ == "__main__":
    serve(lambda **job: commands(JaxTrainer(Job(**job))))
