"""A small training set-up on any mesh of the eight virtual devices: what the tests of the training core share."""

import argparse
import dataclasses
import functools
import re
import shlex
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.cli.main import parser_of
from dsjax.config.run import RunConfig
from dsjax.data.config import ByteTokenizer, DataConfig
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.config import ModelConfig, RandomLTDConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import initial_params, segments_of
from dsjax.models.naming import leaf_names, to_named
from dsjax.models.stack import Segments
from dsjax.models.tree import ModelTree
from dsjax.objectives.registry import chosen_objective
from dsjax.optimizers.api import Measured, StagedTransform, UpdateInputs
from dsjax.optimizers.config import OptimizerConfig
from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.setup.assembly import Setup, assemble
from dsjax.setup.config import TrainConfig
from dsjax.setup.placement import training_placement
from dsjax.setup.programs import Programs
from dsjax.setup.state import TrainState, init_state, make_optimizer

TINY = BloomConfig(vocab_size=64, num_layers=2, model_dim=32, num_heads=8, dropout=0.1, segments=(2,))
"""Eight heads, so that `tensor` may be anything up to 8; one scanned segment, which compiles fastest."""

# The six named meshes on which whole training steps are checked; each splits something that the others do not.
MESHES = {
    "data": MeshConfig(data=8, zero_stage=0),
    "fsdp": MeshConfig(data=1, fsdp=8, zero_stage=3),
    "tensor": MeshConfig(data=1, tensor=8, zero_stage=0),
    "expert": MeshConfig(data=2, fsdp=2, expert=2, zero_stage=2),
    "zero1": MeshConfig(data=4, fsdp=2, zero_stage=1),
    "all": MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3),
}
ONE = MeshConfig(data=1)
ADAMW = AdamWConfig()
# Random-LTD in both layers of TINY: 6 of the first 14 of 16 positions, in 8 slots.
LTD = RandomLTDConfig(steps=1, min_kept=4, quantum=1, first_layers=0, last_layers=0)
LTD_COUNTS = (14, 6)


def make_rows(num_rows: int = 16, length: int = 16, *, vocab: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows of a global batch: several documents a row, very unequal masks, one row that is all padding."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, length)
    tokens = rng.integers(0, vocab, shape).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, shape), axis=1).astype(np.int32)
    starts = np.array([[np.flatnonzero(row == number)[0] for number in row] for row in segments])
    share = (np.arange(num_rows) / (num_rows - 1)) ** 3
    mask = rng.random(shape) < share[:, None]
    segments[0], mask[0] = 0, False
    return {
        "tokens": tokens,
        "targets": rng.integers(0, vocab, shape).astype(np.int32),
        "loss_mask": mask,
        "segments": segments,
        "positions": (np.arange(length) - starts).astype(np.int32),
    }


@functools.cache
def make_params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial parameters on the host by their names in a checkpoint, whatever the segments of `config` are.

    Every tensor is perturbed, so that no bias is zero and no norm is one: what is equal by accident is not tested.
    """
    plain = dataclasses.replace(config, segments=(config.num_layers,))
    params = jax.jit(lambda key: initial_params(plain, key))(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    named = {name: np.asarray(value) for name, value in to_named(params, segments_of(plain)).items()}
    return {name: (v + 0.05 * rng.standard_normal(v.shape)).astype(np.float32) for name, v in sorted(named.items())}


def from_flat(flat: dict[str, np.ndarray], abstract: Any, segments: Segments) -> Any:
    """The inverse of `to_named` on the host: numpy arrays by name as a tree of numpy arrays."""
    leaves = [
        np.stack([flat[name] for name in layers]) if is_stack else flat[layers[0]]
        for layers, is_stack in leaf_names(abstract, segments)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def batch_loss(model: Any, batch: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of some rows, summed over their real targets, and the number of these, by the model's own objective."""
    sums, _ = chosen_objective(model.config).sums(model, batch, **options)
    return sums["loss"], sums["count"]


# Machine code that is not optimised: these programs run a few times, compiling them is what takes the time.
FAST = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A setup whose programs run.

    `gradient` and `train` run the programs compiled with FAST; what a run would compile is in `programs`. `frozen` is
    what is not trained of the model, None when all is.
    """

    setup: Setup
    frozen: Any = None
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.setup.config.model

    @property
    def layout(self) -> Layout:
        return self.setup.layout

    @property
    def model(self) -> ModelTree:
        return self.setup.model

    @property
    def optimizer(self) -> StagedTransform:
        return self.setup.optimizer

    @property
    def shardings(self) -> TrainState:
        return self.setup.shardings

    @property
    def programs(self) -> Programs:
        return self.setup.programs

    def params(self, named: dict[str, np.ndarray] | None = None) -> Any:
        """Parameters on their shards, from tensors by name (default: `make_params`)."""
        named = make_params(self.config) if named is None else named
        return jax.device_put(from_flat(named, self.model.shapes, segments_of(self.config)), self.shardings.params)

    def state(self, named: dict[str, np.ndarray] | None = None) -> TrainState:
        """A state that starts from given parameters."""
        params = self.params(named)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self._first_opt_state(),
            key=jax.random.key(5),
            ema=None if self.shardings.ema is None else jax.tree.map(jnp.copy, params),
        )
        return jax.device_put(state, self.shardings)

    def _first_opt_state(self) -> Any:
        shapes = jax.eval_shape(self.optimizer.init, self.model.shapes)
        if self.optimizer.gradients == "per_worker":
            return jax.jit(lambda: self.optimizer.init(self.model.shapes))()
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # the others start from zeros

    def fresh_state(self, *, seed: int = 0) -> TrainState:
        """A state as a run makes it."""
        make = lambda key: initial_params(self.config, key)
        return init_state(make, self.optimizer, self.shardings, seed=seed)

    def place(self, rows: dict[str, np.ndarray], *, accumulation: int = 1) -> dict[str, jax.Array]:
        """Rows [B, T] on the mesh as [W, A, b, T]."""
        return training_placement(self.layout, batch_size=len(rows["tokens"]), accumulation=accumulation)(rows)

    def gradient(
        self,
        state: TrainState,
        rows: dict[str, np.ndarray],
        *,
        accumulation: int = 1,
        stage: str = "full",
        num_kept: int | None = None,
        counts: tuple[int, int] | None = None,
    ):
        """Gradients and figures, as an update of this stage wants them; with random-LTD where num_kept is given."""
        return self._fast(*self._gradient_call(state, rows, accumulation, stage, num_kept, counts))

    def _gradient_call(self, state, rows, accumulation, stage, num_kept, counts):
        """A name for the program, the program and what it is called with."""
        batch, programs = self.place(rows, accumulation=accumulation), self.programs.with_frozen(self.frozen)
        program = programs.gradient_for(self.optimizer, stage, num_kept=num_kept)
        given = None if counts is None else np.asarray(counts, np.int32)
        inputs = programs.gradient_inputs(self.optimizer, stage, state, batch, counts=given)
        return (stage in self.optimizer.local, num_kept), program, inputs

    def update(self, state: TrainState, gradients: Any, loss: Any, *, learning_rate: float = 1e-2, stage: str = "full"):
        """The state after a step, and figures; the given state is donated."""
        arguments = (state, gradients, jnp.asarray(loss, jnp.float32), jnp.float32(learning_rate))
        return self._fast(f"update {stage}", self.programs.updates[stage], *arguments)

    def train(self, state: TrainState, steps: int, *, accumulation: int = 1):
        """Steps over fresh rows each; the state and one dict of figures a step."""
        history = []
        for number in range(steps):
            rows = make_rows(vocab=self.config.vocab_size, seed=number)
            stage = self.optimizer.stage(number, None)
            gradients, metrics = self.gradient(state, rows, accumulation=accumulation, stage=stage)
            state, more = self.update(state, gradients, metrics["loss"], stage=stage)
            history.append({**jax.device_get(metrics), **jax.device_get(more)})
        return state, history

    def gradient_text(
        self, *, accumulation: int = 1, num_kept: int | None = None, counts: tuple[int, int] | None = None
    ) -> str:
        """The compiled gradient program as text."""
        call = self._gradient_call(self.state(), make_rows(), accumulation, "full", num_kept, counts)
        return self._compiled(*call).as_text()

    def update_text(self) -> str:
        """The compiled update program as text."""
        state = self.state()
        inputs = self.programs.gradient_inputs(self.optimizer, "full", state, self.place(make_rows()))
        gradients, _ = jax.eval_shape(self.programs.gradient, inputs)
        place = lambda g, s: jax.ShapeDtypeStruct(g.shape, g.dtype, sharding=self.layout.named(s))
        gradients = jax.tree.map(place, gradients, self.model.specs(self.layout.gradient))
        rate = jnp.float32(1)
        return self._compiled("update", self.programs.updates["full"], state, gradients, rate, rate).as_text()

    def _fast(self, name: Any, program: Any, *arguments: Any):
        return self._compiled(name, program, *arguments)(*arguments)

    def _compiled(self, name: Any, program: Any, *arguments: Any):
        key = (name, *(leaf.shape for leaf in jax.tree.leaves(arguments)))
        if key not in self.compiled:
            self.compiled[key] = program.lower(*arguments).compile(compiler_options=FAST)
        return self.compiled[key]

    def named(self, tree: Any) -> dict[str, np.ndarray]:
        """A tree like the parameters as one layer's tensors by name, on the host (no program is compiled)."""
        flat = {}
        for (names, is_stack), leaf in zip(
            leaf_names(self.model.shapes, segments_of(self.config)), jax.device_get(jax.tree.leaves(tree)), strict=True
        ):
            flat.update(zip(names, leaf if is_stack else [leaf], strict=True))
        return flat


@functools.cache
def make_training(
    mesh: MeshConfig = ONE,
    config: ModelConfig = TINY,
    optimizer: OptimizerConfig = ADAMW,
    *,
    clip_norm: float = 1.0,
    ema_decay: float = 0.0,
    per_worker: bool = False,
    steps: int = 0,
    only: tuple[str, ...] = (),
    random_ltd: RandomLTDConfig | None = None,
) -> Training:
    """A training set-up on as many of the devices as the mesh needs; the same arguments give the same programs.

    With `only`, tensors whose names end so are trained and the rest is frozen: programs of few tensors compile fast.
    """
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.expert * mesh.tensor]
    run = RunConfig(
        mesh=mesh,
        model=config,
        data=DataConfig(sequence_length=16, tokenizer=ByteTokenizer()),
        optimizer=optimizer,
        random_ltd=random_ltd,
        train=TrainConfig(steps=steps or 1, batch_size=16, clip_norm=clip_norm, ema_decay=ema_decay),
    )
    setup = assemble(run, layout=Layout(make_mesh(mesh, devices=devices), mesh.zero_stage))
    frozen = None
    if only:
        rest = setup.model.part(lambda name: not name.endswith(only))
        trained = setup.model.part(lambda name: name.endswith(only))
        transform = make_optimizer(setup.config.optimizer, trained, setup.layout, steps=setup.schedule.num_steps)
        setup = dataclasses.replace(setup, model=trained, frozen=rest, optimizer=transform)
        values = from_flat(make_params(config), rest.shapes, segments_of(config))
        frozen = jax.device_put(values, jax.tree.map(setup.layout.named, rest.specs(setup.layout.parameter)))
    if per_worker:
        setup = dataclasses.replace(setup, optimizer=_per_worker(setup.optimizer))
    return Training(setup, frozen)


def _per_worker(transform: StagedTransform) -> StagedTransform:
    """The same optimizer, but handed one gradient per worker, which it averages itself."""

    def update(gradients: Any, state: Any, inputs: UpdateInputs, loss: jax.Array, clip_norm: float):
        assert not clip_norm
        changes, state = transform.updates["full"](jax.tree.map(lambda g: g.mean(0), gradients), state, inputs)
        return changes, state, Measured(loss, jnp.isfinite(loss), jnp.int32(-1))

    return dataclasses.replace(transform, updates={"full": update}, gradients="per_worker")


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float, *, what: str) -> None:
    """Tensor by tensor, the largest difference as a share of the tensor's largest absolute value."""
    assert got.keys() == want.keys(), f"{what}: other tensors: {sorted(got.keys() ^ want.keys())}"
    errors = {}
    for name, one in want.items():
        scale = np.abs(one).max()
        errors[name] = float(np.abs(got[name] - one).max() / (scale if scale > 0 else 1))
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    assert errors[worst] <= tolerance, f"{what}: {worst} differs by {errors[worst]:.2e} of its largest value"


def parsed(line: str) -> argparse.Namespace:
    """The arguments of a `dsjax` command as a shell and then its verb take it apart; a text from a file is left out."""
    words = shlex.split(re.sub(r" < \S+$", "", line))
    assert words[0] == "dsjax", line
    return parser_of(words[1])[0].parse_args(words[2:])
