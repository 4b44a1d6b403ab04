"""One process of the training benchmark: whole steps by the programs of `dsjax train`, data parallel over gloo."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from bf16_adam import averaged_in_bf16
from network import own_counters
from side_by_side import serve_and_leave

from dsjax.collectives.hlo import count_collectives
from dsjax.config.load import from_dict
from dsjax.config.run import RunConfig
from dsjax.config.schema import kinds
from dsjax.data.config import DataConfig
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.processes import start_processes
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.tree import count_parameters
from dsjax.optimizers.config import OptimizerConfig
from dsjax.plan.rounds import predict_rounds
from dsjax.setup.assembly import Setup, assemble, first_state
from dsjax.setup.config import TrainConfig
from dsjax.setup.placement import training_placement

BF16 = "bf16_adam"
# What a device sends of a buffer, in (W - 1) / W of it.
WAYS = {"all-reduce": 2, "all-gather": 1, "all-to-all": 1}


class Trainer:
    """The set-up of train/loop.py, with batches that lie ready; stages come as the optimizer's schedule has them."""

    def __init__(self, model: dict[str, Any], optimizer: dict[str, Any], *, rows: int, clip: float, steps: int) -> None:
        start_processes()
        self.kind = optimizer["kind"]
        self.setup = self._setup(GPT2Config(**model), optimizer, TrainConfig(steps=steps, clip_norm=clip))
        self.optimizer, self.programs = self.setup.optimizer, self.setup.programs
        self.rate = np.float32(optimizer["learning_rate"])
        self.state, _ = first_state(self.setup)
        self.batches = [self._batch(GPT2Config(**model), rows, number) for number in range(4)]
        self.done = 0
        self.programs_done: dict[str, Any] = {}

    def _setup(self, model: GPT2Config, given: dict[str, Any], train: TrainConfig) -> Setup:
        kind, constants = self.kind, {"schedule": {"kind": "constant"}} | given
        if kind == BF16:
            kind, constants = "adamw", constants | {"kind": "adamw"}
        data, optimizer = (
            DataConfig(sequence_length=model.max_positions),
            from_dict(kinds(OptimizerConfig)[kind], constants),
        )
        setup = assemble(RunConfig(mesh=MeshConfig(data=-1), model=model, data=data, optimizer=optimizer, train=train))
        if self.kind != BF16:
            return setup
        return dataclasses.replace(setup, optimizer=averaged_in_bf16(setup.optimizer, setup.layout.mesh))

    def _batch(self, config: GPT2Config, rows: int, number: int) -> dict[str, jax.Array]:
        """Tokens with frequencies like a text's, rows of all processes [W, 1, b, T]."""
        placement = training_placement(self.setup.layout, batch_size=rows, accumulation=1)
        odds = 1 / np.arange(1, config.vocab_size + 1)
        shape = (rows, config.max_positions + 1)
        tokens = np.random.default_rng(number).choice(config.vocab_size, shape, p=odds / odds.sum()).astype(np.int32)
        own = tokens[placement.positions]
        return placement(
            {"tokens": own[:, :-1], "targets": own[:, 1:], "loss_mask": np.ones(own[:, 1:].shape, np.bool_)}
        )

    def compiled(self, stage: str) -> tuple[Any, Any]:
        """The gradient and the update program of a stage, compiled once; most stages share the gradient."""
        state, source = self.state, "local" if stage in self.optimizer.local else "gradient"
        if source not in self.programs_done:
            inputs = self.programs.gradient_inputs(self.optimizer, stage, state, self.batches[0])
            program = self.programs.gradient_for(self.optimizer, stage)
            self.programs_done[source] = program.lower(inputs).compile()
        gradient = self.programs_done[source]
        if stage not in self.programs_done:
            gradients, figures = gradient.out_info
            place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            gradients, loss = jax.tree.map(place, gradients), place(figures["loss"])
            self.programs_done[stage] = self.programs.updates[stage].lower(state, gradients, loss, self.rate).compile()
        return gradient, self.programs_done[stage]

    def steps(self, steps: int) -> dict[str, Any]:
        """Of so many steps stage, seconds and what the interface carried; and the last loss."""
        rows, loss = [], np.nan
        for _ in range(steps):
            stage = self.optimizer.stage(self.done, None)
            gradient, update = self.compiled(stage)
            batch = self.batches[self.done % len(self.batches)]
            before, began = own_counters(), time.perf_counter()
            gradients, figures = gradient(self.programs.gradient_inputs(self.optimizer, stage, self.state, batch))
            self.state, _ = update(self.state, gradients, figures["loss"], self.rate)
            del gradients
            jax.block_until_ready(self.state)
            seconds, moved = time.perf_counter() - began, own_counters() - before
            rows.append({"stage": stage, "step_seconds": seconds, "sent": moved.sent, "received": moved.received})
            loss = float(figures["loss"].addressable_data(0).ravel()[0])
            self.done += 1
        return {"steps": rows, "loss": loss}

    def about(self) -> dict[str, Any]:
        """Size, versions, and of each stage the bytes that a process sends in a step: as planned, and in the HLO."""
        planned = {}
        if self.kind != BF16:  # which is no optimizer of dsjax's
            planned = {one.stage: one.sent for one in predict_rounds(self.setup)}
        return {
            "parameters": count_parameters(self.setup.model),
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
            "planned": planned,
            "compiled": {stage: self._sent(stage) for stage in self.programs_done if stage in self.optimizer.updates},
        }

    def _sent(self, stage: str) -> float:
        """Bytes that a process sends in a step, from the texts of the compiled programs."""
        sizes, workers = dict(self.setup.layout.mesh.shape), self.setup.layout.mesh.shape["data"]
        texts = [program.as_text() for program in self.compiled(stage)]
        found = [one for text in texts for one in count_collectives(text, sizes)]
        return sum(one.total_bytes * WAYS[one.kind] for one in found) * (workers - 1) / workers


def load(**job: Any) -> Mapping[str, Callable[..., dict[str, Any]]]:
    trainer = Trainer(**job)
    return {"about": trainer.about, "steps": trainer.steps}


if __name__ == "__main__":
    serve_and_leave(load)
