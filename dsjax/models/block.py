"""One layer of the transformer.

Shapes: B rows, T positions, D model, H heads, G heads of keys and values, K head size.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.attention import Attention, AttentionSpec
from dsjax.layers.context import Context
from dsjax.layers.dropout import dropout, fold
from dsjax.layers.feed_forward import residual_scale
from dsjax.layers.norm import Norm
from dsjax.layers.parameter import derive
from dsjax.layers.statistics import Statistics
from dsjax.models.architecture import Architecture
from dsjax.models.families.config import TransformerConfig
from dsjax.models.feed_forwards import make_feed_forward
from dsjax.models.stack import BlockSpec


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); or norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, spec: BlockSpec, *, key: jax.Array
    ) -> None:
        scale = residual_scale(architecture.num_layers, config.scale_residual_init)
        init = {"std": config.init_std, "residual_scale": scale}
        norm = partial(Norm, architecture.model_dim, architecture.norm, eps=architecture.norm_eps)
        self.attention_norm = norm()
        attention = AttentionSpec(
            num_heads=architecture.num_heads,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            fused=architecture.fused_qkv,
            use_bias=architecture.use_bias,
            scores_by_layer=architecture.scores_by_layer,
            dropout=config.attention_dropout,
        )
        self.attention = Attention(attention, architecture.model_dim, key=derive(key, "attention"), **init)
        self.mlp_norm = norm()
        self.mlp = make_feed_forward(spec.feed_forward, architecture.model_dim, key=derive(key, "mlp"), **init)
        self.config, self.architecture = config, architecture

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Any, Statistics]:
        """The layer's output, its cache (None where the context's view has none) and its feed-forward's statistics."""
        first, rate = self.architecture.norm_first, self.config.dropout
        place = lambda x: context.layout.activation(x, None, None)
        h_BTD = self.attention_norm(x_BTD, context) if first else x_BTD
        residual = h_BTD if self.architecture.residual_after_norm else x_BTD
        y_BTD, cache = self.attention(h_BTD, context)
        x_BTD = place(residual + dropout(y_BTD, fold(context.keys, 1), rate=rate))
        if not first:
            x_BTD = self.attention_norm(x_BTD, context)
        h_BTD = self.mlp_norm(x_BTD, context) if first else x_BTD
        residual = h_BTD if self.architecture.residual_after_norm else x_BTD
        y_BTD, statistics = self.mlp(h_BTD, context)
        x_BTD = place(residual + dropout(y_BTD, fold(context.keys, 2), rate=rate))
        return (x_BTD if first else self.mlp_norm(x_BTD, context)), cache, statistics


def rematerialised(body, policy: str, *, gathered: bool, scanned: bool):
    """Wrap a layer so that the backward pass recomputes what the policy says.

    Only inside a scan is the forward pass out of reach of XLA's common subexpression elimination, which would undo it.
    """
    policies = jax.checkpoint_policies
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=not scanned)
    if policy == "dots":
        return jax.checkpoint(body, prevent_cse=not scanned, policy=policies.dots_with_no_batch_dims_saveable)
    if gathered:
        return jax.checkpoint(body, prevent_cse=not scanned, policy=_keep_all_but_gathered)
    return body


def _keep_all_but_gathered(primitive, *_, **parameters) -> bool:
    """Recompute nothing but the gathering of weights: kept, the whole weights of all layers would undo ZeRO's saving.

    A gathered weight leaves a sharding constraint and then gets its name; as long as either may be kept, it is. (To
    constrain an activation again costs nothing.)
    """
    return primitive.name != "sharding_constraint" and parameters.get("name") != "gathered"
