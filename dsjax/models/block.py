"""One layer of the transformer.

Shapes: B rows, T positions, D model, H heads, G heads of keys and values, K head size, S places of the cache.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.layers.attention import Attention, Visibility, attend
from dsjax.layers.context import Context
from dsjax.layers.dropout import dropout, fold
from dsjax.layers.feed_forward import residual_scale
from dsjax.layers.kv_cache import KeyValues, appended, attend_to_cache, stored
from dsjax.layers.norm import Norm
from dsjax.layers.parameter import derive
from dsjax.layers.statistics import Statistics
from dsjax.models.architecture import Architecture
from dsjax.models.config import TransformerConfig
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
        self.attention = Attention(
            architecture.model_dim,
            architecture.num_heads,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            fused=architecture.fused_qkv,
            use_bias=architecture.use_bias,
            key=derive(key, "attention"),
            **init,
        )
        self.mlp_norm = norm()
        self.mlp = make_feed_forward(spec.feed_forward, architecture.model_dim, key=derive(key, "mlp"), **init)
        self.config, self.architecture = config, architecture

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Visibility,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], Statistics]:
        """The layer's output for a whole row, and the statistics of its feed-forward.

        Args:
            x_BTD: its input.
            visibility: which position sees which.
            context: of the layer.
        """
        h = self.attention_norm(x_BTD, context) if self.architecture.norm_first else x_BTD
        q, k, v = self._project(h, visibility, context)
        drop = {"dropout_keys": fold(context.keys, 0), "dropout_rate": self.config.attention_dropout}
        return self._finish(x_BTD, h, attend(q, k, v, visibility, **drop), context)

    def prefill(
        self, x_BTD: Float[Array, "B T D"], visibility: Visibility, num_places: int, context: Context
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """The output for whole rows, and a cache that holds them, with room up to num_places."""
        h = self.attention_norm(x_BTD, context)
        q, k, v = self._project(h, visibility, context)
        out, _ = self._finish(x_BTD, h, attend(q, k, v, visibility), context)
        return out, stored(k, v, num_places)

    def decode(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Visibility,
        cache: KeyValues,
        start: Int[Array, ""],
        context: Context,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """The output for T new positions, whose keys and values are written to the cache at `start`."""
        h = self.attention_norm(x_BTD, context)
        q, k, v = self._project(h, visibility, context)
        cache = appended(cache, k, v, start)
        mixed = attend_to_cache(q, cache, visibility)
        out, _ = self._finish(x_BTD, h, mixed, context)
        return out, cache

    def _project(self, h_BTD, visibility: Visibility, context: Context):
        """Queries, keys and values; scores are divided by dividing the queries."""
        q, k, v = self.attention.project(h_BTD, visibility, context)
        if self.architecture.scores_by_layer:
            q = (q.astype(jnp.float32) / (context.number + 1)).astype(q.dtype)
        return q, k, v

    def _finish(self, x_BTD, h_BTD, mixed_BTHK, context: Context):
        """From the attended values to the layer's output, with the statistics of its feed-forward."""
        first, rate = self.architecture.norm_first, self.config.dropout
        keys, place = context.keys, lambda x: context.layout.activation(x, None, None)
        residual = h_BTD if self.architecture.residual_after_norm else x_BTD
        x_BTD = residual + dropout(self.attention.finish(mixed_BTHK, context), fold(keys, 1), rate=rate)
        x_BTD = place(x_BTD)
        if not first:
            x_BTD = self.attention_norm(x_BTD, context)
        h_BTD = self.mlp_norm(x_BTD, context) if first else x_BTD
        residual = h_BTD if self.architecture.residual_after_norm else x_BTD
        y_BTD, statistics = self.mlp(h_BTD, context)
        x_BTD = place(residual + dropout(y_BTD, fold(keys, 2), rate=rate))
        return (x_BTD if first else self.mlp_norm(x_BTD, context)), statistics


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
