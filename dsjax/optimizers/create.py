"""OptimizerConfig -> optimizer."""

from jax.sharding import AbstractMesh, Mesh

from dsjax.mesh.layout import ONE_DEVICE
from dsjax.optimizers.api import CreateInputs, StagedTransform, Tree
from dsjax.optimizers.config import OptimizerConfig


def create_optimizer(
    config: OptimizerConfig,
    params: Tree,
    leading: Tree,
    *,
    mesh: Mesh | AbstractMesh = ONE_DEVICE.mesh,
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

    Example:
        >>> import jax.numpy as jnp
        >>> from dsjax.optimizers.kinds.sgd import SGDConfig
        >>> create_optimizer(SGDConfig(), {"w": jnp.ones(2)}, {"w": 0}).gradients
        'mean'
    """
    return config.create(CreateInputs(params, leading, mesh, specs, steps))
