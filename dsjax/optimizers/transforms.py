"""1-bit Adam, 1-bit LAMB and 0/1 Adam as optax transforms, for a training step of one's own.

The update runs inside `jax.shard_map` over the mesh's axis of workers, on the gradients of this worker alone. A stage
is chosen by a count in the state (`lax.switch`), so any optax wrapper may stand around it:

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    tx = onebit_adam(1e-3, mesh=mesh, freeze_step=200)
    state = tx.init(params)
    specs = state_specs(state)

    @partial(jax.jit, donate_argnums=(0, 1))
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs, P()))
    def step(params, state, batch):
        value, gradients = worker_grads(loss, axis="data")(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, "data")

`dsjax train` uses the same algorithms without the switch: a program for each stage.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.collectives.one_bit import Feedback, Scheme
from dsjax.optimizers.guard import guarded
from dsjax.optimizers.onebit_adam import Moments, OneBitAdam
from dsjax.optimizers.onebit_lamb import OneBitLamb
from dsjax.optimizers.workers import Granularity, Tree, Workers
from dsjax.optimizers.zero_one_adam import Displaced, ZeroOneAdam

PARITY = "deepspeed-0.19.6"
Algorithm = OneBitAdam | OneBitLamb | ZeroOneAdam


@dataclasses.dataclass(frozen=True)
class SwitchState:
    """State of an optimizer that chooses its stage by itself.

    Attributes:
        step: updates asked for, skipped ones too, int32.
        inner: the algorithm's state.
    """

    step: Any
    inner: Any


@dataclasses.dataclass(frozen=True)
class PerWorker:
    """A tree of arrays that differ between workers, with a dimension W in front: see `per_worker`."""

    value: Tree


jax.tree_util.register_dataclass(SwitchState)
jax.tree_util.register_dataclass(PerWorker)


def worker_grads(loss: Callable, axis: str = "data") -> Callable:
    """Like jax.value_and_grad, but inside a shard_map the gradient of this worker's loss alone.

    `jax.grad` of parameters that all workers share is summed over them in float32 before one sees it, and there is
    nothing left to compress.

    Args:
        loss: (params, ...) -> scalar, of this worker's part of the batch.
        axis: the workers' mesh axis.

    Returns:
        (params, ...) -> (loss, gradients).
    """

    def value_and_grad(params: Tree, *args: Any, **kwargs: Any) -> tuple[jax.Array, Tree]:
        varying = jax.tree.map(
            lambda p: p if axis in jax.typeof(p).vma else jax.lax.pcast(p, axis, to="varying"), params
        )
        return jax.value_and_grad(loss)(varying, *args, **kwargs)

    return value_and_grad


def state_specs(state: Tree, *, axis: str = "data") -> Tree:
    """The PartitionSpecs of an optimizer's state: what differs between workers is split over their axis.

    Args:
        state: from `init`; also of optax wrappers around one of these transforms.
        axis: the workers' mesh axis.
    """
    apart = lambda node: isinstance(node, Feedback | Displaced | PerWorker)
    split = lambda node: jax.tree.map(lambda _: PartitionSpec(axis), node)
    return jax.tree.map(lambda node: split(node) if apart(node) else PartitionSpec(), state, is_leaf=apart)


def state_shardings(state: Tree, mesh: Mesh, *, axis: str = "data") -> Tree:
    """The same as NamedShardings, for `jax.device_put`, `jax.jit` and checkpoints."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state, axis=axis), is_leaf=is_spec)


def worker_params(params: Tree, state: Tree) -> Tree:
    """The parameters at which this worker takes its gradient: with 0/1 Adam its own, else those that all share.

    Args:
        params: the shared parameters.
        state: the optimizer's state, inside the shard_map.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Displaced))
    for node in nodes:
        if isinstance(node, Displaced):
            return jax.tree.map(lambda p, shift: (p + shift.squeeze(0)).astype(p.dtype), params, node.shift)
    return params


def per_worker(tx: optax.GradientTransformation, num_workers: int) -> optax.GradientTransformationExtraArgs:
    """Give the gradients that optax.MultiSteps accumulates a dimension of workers, since each has its own.

    Example:
        >>> tx = per_worker(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), 4)
        >>> tx.init({"w": jnp.ones(3)}).acc_grads.value["w"].shape
        (4, 3)
    """
    inner = optax.with_extra_args_support(tx)
    is_multi = lambda node: isinstance(node, optax.MultiStepsState)

    def change(state: Tree, how: Callable[[Any], Any]) -> Tree:
        swap = lambda node: node._replace(acc_grads=how(node.acc_grads)) if is_multi(node) else node
        return jax.tree.map(swap, state, is_leaf=is_multi)

    def init(params: Tree) -> Tree:
        wide = lambda x: jnp.zeros((num_workers, *x.shape), x.dtype)
        return change(inner.init(params), lambda grads: PerWorker(jax.tree.map(wide, grads)))

    def update(updates: Tree, state: Tree, params: Tree | None = None, **extra: Any) -> tuple[Tree, Tree]:
        own = change(state, lambda grads: jax.tree.map(lambda x: x.squeeze(0), grads.value))
        updates, own = inner.update(updates, own, params, **extra)
        return updates, change(own, lambda grads: PerWorker(jax.tree.map(lambda x: x[None], grads)))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_onebit_adam(
    *,
    mesh: Mesh,
    freeze_step: int,
    axis: str = "data",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decay_mask: Tree = None,
    bias_correction: bool = True,
    momentum_mask: Tree = None,
    mask_unseen: bool = True,
    granularity: Granularity = "fused",
    scale: str = "l2",
    parity: str = "",
) -> optax.GradientTransformationExtraArgs:
    """Rescale by 1-bit Adam (arXiv 2102.02888), see dsjax/optimizers/onebit_adam.py.

    Args:
        mesh: it has the axis along which workers are counted; the update runs in a shard_map over it.
        freeze_step: steps of ordinary Adam before the variance is frozen and momenta travel in bits: 15 to 25 % of a
            run, and past its learning-rate warm-up.
        axis: the workers' mesh axis.
        b1, b2: decay rates of momentum and variance.
        eps: added to the root of the variance.
        weight_decay: decoupled decay, added here so that a skipped step decays nothing; optax.add_decayed_weights
            behind this transform does it in every step.
        decay_mask: tree of bools, which tensors decay; None: all.
        bias_correction: divide moments by 1 - b^t.
        momentum_mask: tree of 0 and 1 like the parameters; where 0 momentum is held at zero.
        mask_unseen: leave values whose variance is zero at the freeze out of the one-bit mean.
        granularity: "fused", "tensor" or "group": see Workers.
        scale: "l2" or "l1": see Scheme.
        parity: "deepspeed-0.19.6" does what that release did, its defects included.

    Raises:
        ValueError: the mesh has no such axis, or an argument is out of range.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> with warnings.catch_warnings(action="ignore"):  # of the one worker
        ...     tx = scale_by_onebit_adam(mesh=mesh, freeze_step=10)
        >>> tx.init({"w": jnp.ones(3)}).inner.mu["w"].tolist()
        [0.0, 0.0, 0.0]
    """
    workers = _workers(mesh, axis, granularity, scale, parity)
    moments = _moments(b1, b2, eps, bias_correction, weight_decay, decay_mask, momentum_mask, mask_unseen, parity)
    return _switching(OneBitAdam(workers, moments, _static("freeze_step", freeze_step)))


def onebit_adam(
    learning_rate: optax.ScalarOrSchedule, *, mesh: Mesh, freeze_step: int, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """1-bit Adam.

    Args:
        learning_rate: number or schedule.
        mesh, freeze_step, options: as in `scale_by_onebit_adam`.
    """
    scaled = scale_by_onebit_adam(mesh=mesh, freeze_step=freeze_step, **options)
    return optax.chain(scaled, optax.scale_by_learning_rate(learning_rate))


def onebit_lamb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mesh: Mesh,
    freeze_step: int,
    axis: str = "data",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decay_mask: Tree = None,
    max_coeff: Any = 10.0,
    min_coeff: Any = 0.01,
    coeff_beta: Any = 0.9,
    factor_max: Any = 4.0,
    factor_min: Any = 0.5,
    factor_threshold: Any = 0.1,
    bias_correction: bool = True,
    momentum_mask: Tree = None,
    mask_unseen: bool = True,
    granularity: Granularity = "fused",
    scale: str = "l2",
    parity: str = "",
) -> optax.GradientTransformationExtraArgs:
    """1-bit LAMB (arXiv 2104.06069), see dsjax/optimizers/onebit_lamb.py.

    Args:
        learning_rate: number or schedule.
        decay_mask: tree of bools, which tensors decay; None: all.
        max_coeff, min_coeff: bounds of |w| / |update| in the warm-up.
        coeff_beta: decay rate of the coefficients' average; 1 / (1 - coeff_beta) should be well below freeze_step.
        factor_max, factor_min: bounds of the factor that replaces it afterwards.
        factor_threshold: by which share that factor may change in a step.
        mesh, freeze_step, axis, b1, b2, eps, weight_decay, bias_correction, momentum_mask, mask_unseen, granularity,
            scale, parity: as in `onebit_adam`.
    """
    workers = _workers(mesh, axis, granularity, scale, parity)
    moments = _moments(b1, b2, eps, bias_correction, weight_decay, decay_mask, momentum_mask, mask_unseen, parity)
    freeze = _static("freeze_step", freeze_step)
    bounds = (max_coeff, min_coeff, coeff_beta, factor_max, factor_min, factor_threshold)
    lamb = _switching(OneBitLamb(workers, moments, freeze, *bounds))
    return optax.chain(lamb, optax.scale_by_learning_rate(learning_rate))


def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mesh: Mesh,
    var_freeze_step: int,
    var_update_scaler: int = 16,
    local_step_scaler: int = 32678,
    local_step_clipper: int = 16,
    axis: str = "data",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decay_mask: Tree = None,
    bias_correction: bool = True,
    momentum_mask: Tree = None,
    mask_unseen: bool = True,
    granularity: Granularity = "fused",
    scale: str = "l2",
    parity: str = "",
) -> optax.GradientTransformationExtraArgs:
    """0/1 Adam (arXiv 2202.06009), see dsjax/optimizers/zero_one_adam.py.

    Workers leave their common parameters between syncs: take gradients at `worker_params(params, state)`. The momentum
    of the first stage lies in arrays that may differ, so the shard_map around it needs `check_vma=False`.

    Args:
        learning_rate: number or schedule.
        var_freeze_step: the last step at which the variance is learnt: the end of the learning-rate warm-up.
        var_update_scaler: updates of the variance after which their interval doubles (kappa).
        local_step_scaler: steps after which the interval between syncs doubles.
        local_step_clipper: the longest such interval (H).
        mesh, axis, b1, b2, eps, weight_decay, decay_mask, bias_correction, momentum_mask, mask_unseen, granularity,
            scale, parity: as in `onebit_adam`.
    """
    workers = _workers(mesh, axis, granularity, scale, parity)
    moments = _moments(b1, b2, eps, bias_correction, weight_decay, decay_mask, momentum_mask, mask_unseen, parity)
    scalers = [
        _static(name, value)
        for name, value in (
            ("var_freeze_step", var_freeze_step),
            ("var_update_scaler", var_update_scaler),
            ("local_step_scaler", local_step_scaler),
            ("local_step_clipper", local_step_clipper),
        )
    ]
    return _switching(ZeroOneAdam(workers, moments, *scalers), learning_rate)


def _switching(
    algorithm: Algorithm, learning_rate: optax.ScalarOrSchedule = -1.0
) -> optax.GradientTransformationExtraArgs:
    """The algorithm with a count of its own and a branch for each stage."""
    workers, freeze_step = algorithm.workers, algorithm.last_full
    names = [name for name in algorithm.names if name != "lost" or algorithm.moments.peer]

    def init(params: Tree) -> Any:
        _check_masks(algorithm.moments, params)
        return SwitchState(jnp.zeros((), jnp.int32), algorithm.init(params))

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        del extra
        if params is None:
            raise ValueError("pass the parameters: update(gradients, state, params)")
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def branch(name: str) -> Callable:
            def run(gradients: Tree, inner: Any, params: Tree) -> tuple[Tree, Any]:
                as_float = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
                gradients, found = guarded(workers, algorithm.kinds[name], as_float(gradients), jnp.float32(0))
                return algorithm.update(name, gradients, inner, as_float(params), rate, found.finite)

            return run

        stage = algorithm.stage(state.step, freeze_step, jnp)
        changes, inner = jax.lax.switch(stage, [branch(name) for name in names], updates, state.inner, params)
        changes = jax.tree.map(lambda change, g: change.astype(g.dtype), changes, updates)
        return changes, SwitchState(state.step + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _workers(mesh: Mesh, axis: str, granularity: Granularity, scale: str, parity: str) -> Workers:
    if axis not in mesh.shape:
        raise ValueError(f"axis = {axis!r} is not an axis of the mesh; it has {dict(mesh.shape)}")
    if parity not in ("", PARITY):
        raise ValueError(f"parity = {parity!r}; allowed are '' and {PARITY!r}")
    if granularity not in ("fused", "tensor", "group"):
        raise ValueError(f"granularity = {granularity!r}; allowed are 'fused', 'tensor' and 'group'")
    if scale not in ("l2", "l1"):
        raise ValueError(f"scale = {scale!r}; allowed are 'l2' and 'l1'")
    if mesh.shape[axis] == 1:
        warnings.warn(f"the axis {axis!r} has one worker: nothing is compressed", stacklevel=3)
    scheme = Scheme(scale, "chunk", peer_padding=True) if parity else Scheme(scale)
    return Workers(axis, mesh.shape[axis], granularity=granularity, scheme=scheme)


def _moments(
    b1: Any, b2: Any, eps: Any, bias_correction: bool, weight_decay: Any, decays: Tree, mask: Tree, mask_unseen: bool,
    parity: str,
) -> Moments:  # fmt: skip
    return Moments(b1, b2, eps, bias_correction and not parity, weight_decay, decays, mask, mask_unseen, bool(parity))


def _static(name: str, value: Any) -> int:
    """A step of a schedule as a Python int."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} must be a Python int, known before the program is compiled; got an array. With "
            f"optax.inject_hyperparams name it in static_args"
        )
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of 1 or more; got {value!r}")
    return value


def _check_masks(moments: Moments, params: Tree) -> None:
    for name, mask in (("momentum_mask", moments.mask), ("decay_mask", moments.decays)):
        if mask is not None and jax.tree.structure(mask) != jax.tree.structure(params):
            raise ValueError(
                f"{name} must have the structure of the parameters, {jax.tree.structure(params)}; got "
                f"{jax.tree.structure(mask)}"
            )
