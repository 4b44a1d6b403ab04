"""One process of the training benchmark: whole steps by the programs of `dsjax train`, data parallel over gloo."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from bf16_adam import averaged_in_bf16
from network import own_counters
from side_by_side import serve_and_leave

from dsjax.collectives.hlo import count_collectives
from dsjax.config.load import from_dict
from dsjax.config.schema import kinds
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.mesh.processes import start_processes
from dsjax.models.config import GPT2Config
from dsjax.models.families.registry import abstract, initial_params
from dsjax.models.tree import ModelTree, count_parameters
from dsjax.objectives.registry import objective_of
from dsjax.optimizers.api import StagedTransform
from dsjax.optimizers.config import AdamWConfig, OptimizerConfig
from dsjax.plan.rounds import predict_rounds
from dsjax.setup.placement import training_placement
from dsjax.setup.programs import make_programs
from dsjax.setup.state import init_state, make_optimizer, state_shardings
from dsjax.setup.step import StepOptions

BF16 = "bf16_adam"
# What a device sends of a buffer, in (W - 1) / W of it.
WAYS = {"all-reduce": 2, "all-gather": 1, "all-to-all": 1}


class Trainer:
    """What train/loop.py sets up, with batches that lie ready; stages come as the optimizer's schedule has them."""

    def __init__(self, model: dict[str, Any], optimizer: dict[str, Any], *, rows: int, clip: float, steps: int) -> None:
        start_processes()
        self.layout = Layout(make_mesh(MeshConfig(data=-1)))
        config = GPT2Config(**model)
        self.model = ModelTree.of(abstract(config))
        self.optimizer = self._optimizer(optimizer, steps)
        self.kind, self.total = optimizer["kind"], steps
        self.shardings = state_shardings(self.layout, self.model, self.optimizer, ema=False)
        options = StepOptions(objective=objective_of("language_model"), clip_norm=clip)
        self.programs = make_programs(self.model, self.optimizer, self.layout, self.shardings, options)
        self.rate = np.float32(optimizer["learning_rate"])
        self.state = init_state(partial(initial_params, config), self.optimizer, self.shardings, seed=0)
        self.batches = [self._batch(config, rows, number) for number in range(4)]
        self.done = 0
        self.programs_done: dict[str, Any] = {}

    def _optimizer(self, given: dict[str, Any], steps: int) -> StagedTransform:
        constants = {"schedule": {"kind": "constant"}} | given
        if given["kind"] == BF16:
            adam = from_dict(AdamWConfig, constants | {"kind": "adamw"})
            return averaged_in_bf16(make_optimizer(adam, self.model, self.layout, steps=steps), self.layout.mesh)
        config = from_dict(kinds(OptimizerConfig)[given["kind"]], constants)
        return make_optimizer(config, self.model, self.layout, steps=steps)

    def _batch(self, config: GPT2Config, rows: int, number: int) -> dict[str, jax.Array]:
        """Tokens with frequencies like a text's, rows of all processes [W, 1, b, T]."""
        placement = training_placement(self.layout, batch_size=rows, accumulation=1)
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
            opt_state = jax.eval_shape(self.optimizer.init, self.model.shapes)
            rounds = predict_rounds(self.model, self.optimizer, opt_state, self.layout, steps=self.total)
            planned = {one.stage: one.sent for one in rounds}
        return {
            "parameters": count_parameters(self.model),
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
            "planned": planned,
            "compiled": {stage: self._sent(stage) for stage in self.programs_done if stage in self.optimizer.updates},
        }

    def _sent(self, stage: str) -> float:
        """Bytes that a process sends in a step, from the texts of the compiled programs."""
        sizes, workers = dict(self.layout.mesh.shape), self.layout.mesh.shape["data"]
        texts = [program.as_text() for program in self.compiled(stage)]
        found = [one for text in texts for one in count_collectives(text, sizes)]
        return sum(one.total_bytes * WAYS[one.kind] for one in found) * (workers - 1) / workers


def load(**job: Any) -> Mapping[str, Callable[..., dict[str, Any]]]:
    trainer = Trainer(**job)
    return {"about": trainer.about, "steps": trainer.steps}


if __name__ == "__main__":
    serve_and_leave(load)
