"""The 1-bit optimizers on virtual devices against the numpy oracle in float64, whole runs through all stages.

Each runs on three or four workers that hold whole tensors, with clipping, a user's mask and gradients that are not
finite, on two workers whose tensors are split over `tensor` and stacked, with the options that the first has not, and
on two whose tensors are experts, shared out over `expert`.
In all some values get their first gradient long after the freeze. The oracle knows neither devices nor stacks: a
tensor is a layer's. Tolerance: 2e-5 of a tensor's largest value, float32 against float64 over 26 steps. A sign that
flips because rounding decides it would show as a jump of the order of a scale.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from one_bit_oracle import OURS, OneBitAdam, OneBitLamb, Rules, ZeroOneAdam

from dsjax.collectives.one_bit import Scheme
from dsjax.optimizers.algorithms import onebit_adam, onebit_lamb, zero_one_adam
from dsjax.optimizers.guard import guarded
from dsjax.optimizers.workers import Workers
from tests.helpers import FAST

TOLERANCE = 2e-5
SHAPES = [(3, 4, 6), (12,)]
# With devices along `tensor` the first is split over them and a stack of three layers; all of them hold the second.
SPECS = [P(None, None, "tensor"), P()]
# With devices along `expert` the first is three layers of four experts each, of which a device has two.
EXPERT_SPECS = [P(None, "expert", "tensor"), P()]
ADAM = {"freeze_step": 8, "weight_decay": 0.05}
LAMB = {"freeze_step": 8, "weight_decay": 0.05, "max_coeff": 1.5, "factor_threshold": 0.2}
ZERO_ONE = {
    "var_freeze_step": 9, "var_update_scaler": 2, "local_step_scaler": 4, "local_step_clipper": 4, "weight_decay": 0.05,
}  # fmt: skip
ALGORITHMS = {
    "adam": (onebit_adam.OneBitAdam, OneBitAdam, ADAM),
    "lamb": (onebit_lamb.OneBitLamb, OneBitLamb, LAMB),
    "zero_one": (zero_one_adam.ZeroOneAdam, ZeroOneAdam, ZERO_ONE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """workers x expert x tensor devices; bad: (step, worker) pairs whose gradient is Inf; masked: by the user, too."""

    workers: int
    expert: int = 1
    tensor: int = 1
    granularity: str = "fused"
    rules: Rules = OURS
    bad: tuple[tuple[int, int], ...] = ()
    masked: bool = False
    steps: int = 26

    @property
    def stacked(self) -> bool:
        return self.tensor > 1

    @property
    def specs(self) -> list[P]:
        return EXPERT_SPECS if self.expert > 1 else SPECS if self.stacked else [P(), P()]

    @property
    def leading(self) -> list[int]:
        """How many of the tensors' first dimensions count tensors."""
        return [2 if self.expert > 1 else 1 if self.stacked else 0, 0]


WHOLE = Case(workers=4, rules=dataclasses.replace(OURS, clip=9.0), bad=((2, 1), (7, 0), (12, 3), (21, 2)), masked=True)
SPLIT = Case(
    workers=2,
    tensor=2,
    granularity="tensor",
    rules=dataclasses.replace(OURS, scale="l1", bias_correction=False, clip=6.0, clip_by="local"),
)
GROUP = Case(
    workers=3,
    granularity="group",
    rules=dataclasses.replace(OURS, granularity="group", clip=9.0),
    bad=((2, 1), (12, 2)),
    masked=True,
)


EXPERTS = Case(workers=2, expert=2, tensor=2, rules=dataclasses.replace(OURS, clip=9.0), bad=((2, 1), (12, 0)))


def inputs(case: Case) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Parameters, gradients [T, W, ...], learning rates [T] and the user's masks.

    Of tensor 0 the last row of every layer has no gradient until step 15, long after the freeze, and another none until
    step 3, after 0/1 Adam's first 1-bit step. Tensor 1 is zero at first, so that LAMB's coefficient of the first step
    is 1 and takes no part in its average.
    """
    rng = np.random.default_rng(11)
    params = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    params[1][:] = 0
    gradients = []
    for shape in SHAPES:
        shared = rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 1)
        gradients.append((shared + rng.standard_normal((case.steps, case.workers, *shape))).astype(np.float32))
    gradients[0][:15, :, :, -1] = 0
    gradients[0][:3, :, :, 1] = 0
    for t, worker in case.bad:
        gradients[1][t, worker, 3] = np.inf
    masks = [np.ones(shape, bool) for shape in SHAPES]
    masks[1][::5] = False
    return params, gradients, (0.02 * (1 + np.arange(case.steps) % 3)).astype(np.float32), masks


def by_layer(tensors: list[np.ndarray], case: Case, *, at: int = 0) -> list[np.ndarray]:
    """Tensors as the oracle has them: stacks apart. `at`: the dimension that counts layers."""
    found = []
    for x, first in zip(tensors, case.leading, strict=True):
        x = np.moveaxis(x, range(at, at + first), range(first))
        found += list(x.reshape(-1, *x.shape[first:])) if first else [x]
    return found


def optimizer_of(kind: str, case: Case) -> tuple[Workers, Any]:
    """The algorithm as a case wants it."""
    make, _, options = ALGORITHMS[kind]
    options = dict(options)
    moments = onebit_adam.Moments(
        weight_decay=options.pop("weight_decay"),
        bias_correction=case.rules.bias_correction,
        mask=inputs(case)[3] if case.masked else None,
    )
    workers = Workers(
        axis="data",
        num=case.workers,
        model_axes={"expert": case.expert, "tensor": case.tensor} if case.stacked else {},
        specs=case.specs if case.stacked else None,
        leading=case.leading if case.stacked else None,
        granularity=case.granularity,
        scheme=Scheme(scale=case.rules.scale),
    )
    return workers, make(workers=workers, moments=moments, **options)


def seen(workers: Workers, params, state, stage) -> dict:
    """What is compared of a step: parameters where this worker is, and moments."""
    found = {"param": workers.kept(params), "v": workers.kept(state.nu), "stage": stage[None]}
    if isinstance(state, zero_one_adam.ZeroOneAdamState):
        here = [p + u for p, u in zip(params, workers.own(state.displaced.shift), strict=True)]
        return found | {"param": workers.kept(here), "m": state.displaced.mu}
    if isinstance(state, onebit_lamb.OneBitLambState):
        found["coefficient"] = state.last
    return found | {"m": workers.kept(state.mu)}


def run(kind: str, case: Case) -> dict:
    """dsjax's run, one program: what is `seen` after each step, [T, ...]."""
    workers, algorithm = optimizer_of(kind, case)
    params, gradients, rates, _ = inputs(case)
    clip = {"clip_norm": case.rules.clip or 0.0, "clip": case.rules.clip_by}

    def update(carry, now):
        params, state, step = carry
        gradients, rate = now

        def branch(name):
            def of(state):
                own = [g[0] for g in gradients]
                usable, found = guarded(workers, algorithm.kinds[name], own, jnp.float32(0), **clip)
                return algorithm.update(name, usable, state, params, rate, found.finite)

            return of

        stage = algorithm.stage(step, algorithm.last_full, jnp)
        branches = [branch(name) for name in algorithm.names if name != "noop"]
        changes, state = jax.lax.switch(stage, branches, state)
        params = [p + change for p, change in zip(params, changes, strict=True)]
        return (params, state, step + 1), seen(workers, params, state, stage)

    mesh = jax.make_mesh(
        (case.workers, case.expert, case.tensor),
        ("data", "expert", "tensor"),
        devices=jax.devices()[: case.workers * case.expert * case.tensor],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    specs = case.specs
    kept = jax.tree.map(lambda s: P(None, *s), workers.specs_of_kept(params), is_leaf=lambda x: isinstance(x, P))
    out = {"param": kept, "m": kept, "v": kept, "stage": P(None, "data")}
    out |= {"coefficient": [P(None, *spec) for spec in workers.specs_of_each(params)]} if kind == "lamb" else {}

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, algorithm.specs(params), [P(None, "data", *spec) for spec in specs], P()),
        out_specs=out,
        check_vma=False,
    )
    def program(params, state, gradients, rates):
        return jax.lax.scan(update, (params, state, jnp.int32(0)), (gradients, rates))[1]

    arguments = (params, algorithm.init(params), gradients, rates)
    return jax.tree.map(np.asarray, jax.jit(program).lower(*arguments).compile(FAST)(*arguments))


CASES = [
    ("adam", GROUP), ("adam", SPLIT), ("lamb", WHOLE), ("lamb", SPLIT), ("zero_one", WHOLE), ("zero_one", SPLIT),
    ("lamb", EXPERTS), ("zero_one", EXPERTS),
]  # fmt: skip
NAMES = [f"{kind}-w{case.workers}" + "-experts" * (case.expert > 1) for kind, case in CASES]


@pytest.mark.parametrize(("kind", "case"), CASES, ids=NAMES)
def test_a_run_is_the_oracles(kind, case):
    params, gradients, rates, masks = inputs(case)
    found = run(kind, case)
    oracle = ALGORITHMS[kind][1](
        by_layer(params, case),
        num_workers=case.workers,
        masks=by_layer(masks, case) if case.masked else None,
        rules=case.rules,
        **ALGORITHMS[kind][2],
    )
    kinds = []
    for t in range(case.steps):
        kinds.append(oracle.step(by_layer([g[t] for g in gradients], case, at=1), lr=float(rates[t])))
        own = {"param": oracle.worker_params if kind == "zero_one" else oracle.params, "m": oracle.m, "v": oracle.v}
        for name, tensors in own.items():
            # A stack of layers has the workers behind the layers.
            ours = by_layer([x[t] for x in found[name]], case)
            for k, (a, b) in enumerate(zip(ours, tensors, strict=True)):
                np.testing.assert_allclose(
                    a,
                    np.broadcast_to(b, a.shape),
                    rtol=0,
                    atol=TOLERANCE * np.abs(b).max(),
                    err_msg=f"{name} of tensor {k} after step {t} ({kinds})",
                )
        if kind == "lamb" and kinds[-1] != "skipped":
            ours = np.concatenate([x[t].ravel() for x in found["coefficient"]])
            np.testing.assert_allclose(ours, oracle.coefficients, rtol=TOLERANCE, err_msg=f"coefficients at {t}")
    _, algorithm = optimizer_of(kind, case)
    names = [algorithm.kinds[algorithm.names[stage]] for stage in found["stage"][:, 0]]
    for name, own in zip(names, kinds, strict=True):
        assert own in ("skipped", {"compressed": "onebit"}.get(name, name))
    wanted = {"full", "onebit"} | ({"local", "sync"} if kind == "zero_one" else set())
    assert wanted | ({"skipped"} if case.bad else set()) == set(kinds)
