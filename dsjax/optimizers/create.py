"""OptimizerConfig -> optimizer."""

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh

from dsjax.collectives.one_bit import Scheme
from dsjax.mesh.config import AXES
from dsjax.optimizers.algorithms.algorithm import Algorithm
from dsjax.optimizers.algorithms.onebit_adam import Moments, OneBitAdam
from dsjax.optimizers.algorithms.onebit_lamb import OneBitLamb
from dsjax.optimizers.algorithms.zero_one_adam import ZeroOneAdam
from dsjax.optimizers.api import FreezeRule, StagedTransform, Tree, lift
from dsjax.optimizers.config import (
    AdamWConfig,
    LambConfig,
    OneBitAdamConfig,
    OneBitLambConfig,
    OptimizerConfig,
    SGDConfig,
    ZeroOneAdamConfig,
)
from dsjax.optimizers.lamb import scale_by_layer_trust_ratio
from dsjax.optimizers.staged import staged
from dsjax.optimizers.workers import Workers

ONE_DEVICE = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def create_optimizer(
    config: OptimizerConfig,
    params: Tree,
    leading: Tree,
    *,
    mesh: Mesh | AbstractMesh = ONE_DEVICE,
    specs: Tree = None,
    steps: int = 0,
) -> StagedTransform:
    """The optimizer of a run; the learning rate comes from outside, step by step.

    Args:
        config: which, and its constants.
        params: the parameters or their shapes.
        leading: tree of ints: how many of the first dimensions count tensors (layers, experts).
        mesh: the devices; those with compressed communication count their workers along `data`.
        specs: tree of the specs of the optimizer's state of each parameter; None: whole on every device.
        steps: of the whole run: where a freeze is given as 0, it is a share of them.
    """
    decays = jax.tree.map(lambda p, first: config.decay_mask == "all" or p.ndim - first >= 2, params, leading)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decays)
    match config:
        case AdamWConfig():
            return lift(optax.chain(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), decay))
        case LambConfig():
            adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
            return lift(optax.chain(adam, decay, scale_by_layer_trust_ratio(leading)))
        case SGDConfig():
            velocity = optax.trace(config.momentum, nesterov=config.nesterov) if config.momentum else optax.identity()
            return lift(optax.chain(velocity, decay))
        case OneBitAdamConfig() | OneBitLambConfig() | ZeroOneAdamConfig():
            others = {axis: size for axis, size in mesh.shape.items() if axis != "data"}
            scheme = Scheme(config.scale, kernel=config.kernel)
            workers = Workers("data", mesh.shape["data"], others, specs, leading, config.granularity, scheme)
            moments = Moments(config.b1, config.b2, config.eps, config.bias_correction, config.weight_decay, decays)
            algorithm = _algorithm(config, workers, moments, config.last_full(steps))
            return staged(algorithm, mesh, clip=config.clip, freeze=_freeze_rule(config))


def _algorithm(
    config: OneBitAdamConfig | OneBitLambConfig | ZeroOneAdamConfig, workers: Workers, moments: Moments, last_full: int
) -> Algorithm:
    match config:
        case OneBitAdamConfig():
            return OneBitAdam(workers, moments, last_full)
        case OneBitLambConfig():
            bounds = (config.max_coeff, config.min_coeff, config.coeff_beta)
            factors = (config.factor_max, config.factor_min, config.factor_threshold)
            return OneBitLamb(workers, moments, last_full, *bounds, *factors)
        case ZeroOneAdamConfig():
            intervals = (config.var_update_scaler, config.local_step_scaler, config.local_step_clipper)
            return ZeroOneAdam(workers, moments, last_full, *intervals)


def _freeze_rule(config: OneBitAdamConfig | OneBitLambConfig | ZeroOneAdamConfig) -> FreezeRule | None:
    if isinstance(config, ZeroOneAdamConfig) or not config.freeze_tolerance:
        return None
    # The host reads the metrics of step t when t + 1 is under way; 1-bit LAMB's last full step is a program of its own.
    return FreezeRule(config.freeze_tolerance, config.freeze_every, 2 if isinstance(config, OneBitLambConfig) else 1)


def advice(config: OptimizerConfig, *, workers: int, steps: int, growing_until: int = 0) -> list[str]:
    """Warnings about settings that a user may not have meant.

    Args:
        config: the optimizer.
        workers: size of the mesh's axis `data`.
        steps: of the whole run.
        growing_until: the step up to which rows become longer or more of their tokens are kept; 0 if they never do.

    Example:
        >>> advice(OneBitAdamConfig(freeze_step=10), workers=1, steps=100)
        ['mesh.data = 1: there is one worker, and nothing is compressed']
    """
    if isinstance(config, AdamWConfig | LambConfig | SGDConfig):
        return []
    found = []
    if workers == 1:
        found.append("mesh.data = 1: there is one worker, and nothing is compressed")
    schedule, last = config.schedule, config.last_full(steps)
    if schedule.warmup_by == "steps" and last < schedule.warmup:
        name = "var_freeze_step" if isinstance(config, ZeroOneAdamConfig) else "freeze_step"
        found.append(
            f"optimizer.{name} = {last} lies inside the learning rate's warm-up of {schedule.warmup} steps: the "
            "variance is frozen while gradients still change fast; freeze after it"
        )
    if last < growing_until:
        name = "var_freeze_step" if isinstance(config, ZeroOneAdamConfig) else "freeze_step"
        found.append(
            f"optimizer.{name} = {last} lies before step {growing_until}, up to which rows or kept tokens grow: the "
            "variance of short rows is not that of long ones; freeze after it"
        )
    if isinstance(config, OneBitLambConfig) and last * (1 - config.coeff_beta) < 1:
        found.append(
            f"optimizer.freeze_step = {last} is fewer steps than the coefficients' average needs, "
            f"1 / (1 - coeff_beta) = {1 / (1 - config.coeff_beta):.0f}"
        )
    return found
