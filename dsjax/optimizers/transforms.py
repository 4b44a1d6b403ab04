"""1-bit Adam, 1-bit LAMB and 0/1 Adam as optax transforms, for your own training step.

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

0/1 Adam and gradient accumulation: docs/training_step.md. `dsjax train` uses the same algorithms without the switch: a
program for each stage.
"""

from typing import Any

import optax
from jax.sharding import Mesh

from dsjax.optimizers.algorithms.onebit_adam import Moments, OneBitAdam
from dsjax.optimizers.algorithms.onebit_lamb import OneBitLamb
from dsjax.optimizers.algorithms.zero_one_adam import ZeroOneAdam
from dsjax.optimizers.switching import Mask, Scale, make_workers, static_step, switching, with_parity
from dsjax.optimizers.workers import Granularity


def scale_by_onebit_adam(
    *,
    mesh: Mesh,
    freeze_step: int,
    axis: str = "data",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decay_mask: Mask = None,
    bias_correction: bool = True,
    momentum_mask: Mask = None,
    mask_unseen: bool = True,
    granularity: Granularity = "fused",
    scale: Scale = "l2",
    parity: str = "",
) -> optax.GradientTransformationExtraArgs:
    """Rescale by 1-bit Adam (arXiv 2102.02888), see dsjax/optimizers/algorithms/onebit_adam.py.

    Args:
        mesh: it has the axis along which workers are counted; the update runs in a shard_map over it.
        freeze_step: steps of ordinary Adam before the variance is frozen and momenta are sent at one bit a value: 15 to
            25 % of a run, and past its learning-rate warm-up.
        axis: the workers' mesh axis.
        b1, b2: decay rates of momentum and variance.
        eps: added to the root of the variance.
        weight_decay: decoupled decay, added here so that a skipped step decays nothing; optax.add_decayed_weights
            behind this transform does it in every step.
        decay_mask: tree of bools, which tensors decay, or a function params -> such a tree; None: all.
        bias_correction: divide moments by 1 - b^t.
        momentum_mask: tree of arrays of 0 and 1 like the parameters, or a function params -> such a tree; where 0
            momentum is held at zero.
        mask_unseen: leave values whose variance is zero at the freeze out of the one-bit mean.
        granularity: "fused", "tensor" or "group": see Workers.
        scale: "l2" or "l1": see Scheme.
        parity: "deepspeed-0.19.6" does what that release did, its defects included.

    Raises:
        ValueError: the mesh has no such axis, or an argument is out of range.

    Example:
        >>> import jax, warnings
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> with warnings.catch_warnings(action="ignore"):  # of the one worker
        ...     tx = scale_by_onebit_adam(mesh=mesh, freeze_step=10)
        >>> tx.init({"w": jax.numpy.ones(3)}).inner.mu["w"].tolist()
        [0.0, 0.0, 0.0]
    """
    workers = make_workers(mesh, axis, granularity, scale, parity)
    moments = Moments(b1, b2, eps, bias_correction, weight_decay, decay_mask, momentum_mask, mask_unseen)
    moments = with_parity(moments, parity)
    return switching(OneBitAdam(workers, moments, static_step("freeze_step", freeze_step)))


def onebit_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mesh: Mesh,
    freeze_step: int,
    axis: str = "data",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decay_mask: Mask = None,
    bias_correction: bool = True,
    momentum_mask: Mask = None,
    mask_unseen: bool = True,
    granularity: Granularity = "fused",
    scale: Scale = "l2",
    parity: str = "",
) -> optax.GradientTransformationExtraArgs:
    """1-bit Adam with its learning rate.

    Args:
        learning_rate: number or schedule.
        mesh, freeze_step, axis, b1, b2, eps, weight_decay, decay_mask, bias_correction, momentum_mask, mask_unseen,
            granularity, scale, parity: as in `scale_by_onebit_adam`.
    """
    workers = make_workers(mesh, axis, granularity, scale, parity)
    moments = Moments(b1, b2, eps, bias_correction, weight_decay, decay_mask, momentum_mask, mask_unseen)
    moments = with_parity(moments, parity)
    adam = switching(OneBitAdam(workers, moments, static_step("freeze_step", freeze_step)))
    return optax.chain(adam, optax.scale_by_learning_rate(learning_rate))


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
    decay_mask: Mask = None,
    max_coeff: Any = 10.0,
    min_coeff: Any = 0.01,
    coeff_beta: Any = 0.9,
    factor_max: Any = 4.0,
    factor_min: Any = 0.5,
    factor_threshold: Any = 0.1,
    bias_correction: bool = True,
    momentum_mask: Mask = None,
    mask_unseen: bool = True,
    granularity: Granularity = "fused",
    scale: Scale = "l2",
    parity: str = "",
) -> optax.GradientTransformationExtraArgs:
    """1-bit LAMB (arXiv 2104.06069), see dsjax/optimizers/algorithms/onebit_lamb.py.

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
    workers = make_workers(mesh, axis, granularity, scale, parity)
    moments = Moments(b1, b2, eps, bias_correction, weight_decay, decay_mask, momentum_mask, mask_unseen)
    moments = with_parity(moments, parity)
    freeze = static_step("freeze_step", freeze_step)
    bounds = (max_coeff, min_coeff, coeff_beta, factor_max, factor_min, factor_threshold)
    lamb = switching(OneBitLamb(workers, moments, freeze, *bounds))
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
    decay_mask: Mask = None,
    bias_correction: bool = True,
    momentum_mask: Mask = None,
    mask_unseen: bool = True,
    granularity: Granularity = "fused",
    scale: Scale = "l2",
    parity: str = "",
) -> optax.GradientTransformationExtraArgs:
    """0/1 Adam (arXiv 2202.06009), see dsjax/optimizers/algorithms/zero_one_adam.py.

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
    workers = make_workers(mesh, axis, granularity, scale, parity)
    moments = Moments(b1, b2, eps, bias_correction, weight_decay, decay_mask, momentum_mask, mask_unseen)
    moments = with_parity(moments, parity)
    scalers = [
        static_step(name, value)
        for name, value in (
            ("var_freeze_step", var_freeze_step),
            ("var_update_scaler", var_update_scaler),
            ("local_step_scaler", local_step_scaler),
            ("local_step_clipper", local_step_clipper),
        )
    ]
    return switching(ZeroOneAdam(workers, moments, *scalers), learning_rate)
