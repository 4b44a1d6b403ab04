"""Description of a transformer: the sizes of a model, and everything in which families differ.

Layers, planner and formats ask the Architecture for these, not a family's config; what all families set alike (dropout,
task, the number of layers) the config tells too.
"""

import dataclasses
from typing import Any, Literal

from dsjax.layers.feed_forward import Activation, DenseSpec
from dsjax.layers.norm import NormKind
from dsjax.mesh.layout import Layout
from dsjax.models.families.config import Remat, TransformerConfig
from dsjax.models.stack import BlockSpec, Segments, cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model's sizes and its family's choices; the defaults are GPT-2's.

    Attributes:
        vocab_size: V, rows of the embedding.
        num_layers: L.
        model_dim: D, width of the residual stream.
        num_heads: H, heads of queries.
        num_kv_heads: G, heads of keys and values, each shared by H / G heads of queries.
        head_dim: K, size of a head.
        hidden_dim: F, hidden width of the MLP.
        norm_eps: added to the variance in every norm.
        positions: where order comes from.
        max_positions: the longest row, and rows of a learned position table; 0 when there is no limit.
        frequencies: RoPE's radians per position, [K / 2].
        causal: whether a position sees only those before it.
        norm: the kind of normalisation.
        norm_first: normalise what goes into attention and MLP (pre-LayerNorm), or what comes out, residual included.
        embedding_norm: a norm between the embedding and the first block.
        residual_after_norm: residuals start from the norm's output instead of its input.
        activation: of the MLP.
        gated: whether the MLP has a gate.
        use_bias: whether the projections have biases.
        fused_qkv: query, key and value as one projection.
        token_types: rows of a table of segment embeddings; 0 when there is none.
        scores_by_layer: attention scores of layer i, counted from 0, are divided by i + 1.
        tied: logits use the embedding's table.
        masked_head: a language model transforms its features once more before the logits, which have a bias.
        pooler: the first position's features go through a perceptron of one layer before they are classified.
        layers: the kind of every layer, in order; () means that all are dense: hidden_dim, activation, gated, use_bias.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    positions: Literal["alibi", "learned", "rope"]
    max_positions: int = 0
    frequencies: tuple[float, ...] = ()
    causal: bool = True
    norm: NormKind = "layer"
    norm_first: bool = True
    embedding_norm: bool = False
    residual_after_norm: bool = False
    activation: Activation = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    fused_qkv: bool = True
    token_types: int = 0
    scores_by_layer: bool = False
    tied: bool = True
    masked_head: bool = False
    pooler: bool = False
    layers: tuple[BlockSpec, ...] = ()

    def segments(self, lengths: tuple[int, ...]) -> Segments:
        """The stack of a model's layers.

        Args:
            lengths: numbers of layers that one loop computes (`segment_lengths` of a config).
        """
        dense = DenseSpec(self.hidden_dim, self.activation, self.gated, self.use_bias)
        return cut(self.layers or (BlockSpec(dense),) * self.num_layers, lengths)

    @property
    def attention_dim(self) -> int:
        """H * K, over which the scores of a layer are sums."""
        return self.num_heads * self.head_dim

    @property
    def divided_by_tensor(self) -> dict[str, int]:
        """The sizes that mesh.tensor has to divide, by their keys in a config; fewer heads of keys may stay whole."""
        return {"num_heads": self.num_heads, "mlp_dim": self.hidden_dim, "vocab_size": self.vocab_size}

    def on_one_device(self, tensor: int) -> "Architecture":
        """The part that one of `tensor` devices computes: heads, hidden width and vocabulary divided.

        Args:
            tensor: size of the mesh axis; it divides the model (`check_divisible`).

        Example:
            >>> from dsjax.models.families.gpt2.config import GPT2Config
            >>> whole = Architecture(**sizes(GPT2Config(vocab_size=50304)), positions="learned")
            >>> part = whole.on_one_device(4)
            >>> part.num_heads, part.head_dim, part.hidden_dim, part.vocab_size
            (3, 64, 768, 12576)
        """
        heads = self.num_heads // tensor
        # Fewer heads of keys and values than devices stay whole; the shapes of the parameters say so to the layer.
        split = self.num_kv_heads % tensor == 0
        return dataclasses.replace(
            self,
            num_heads=heads,
            num_kv_heads=self.num_kv_heads // tensor if split else heads,
            hidden_dim=self.hidden_dim // tensor,
            vocab_size=self.vocab_size // tensor,
            layers=tuple(BlockSpec(layer.feed_forward.on_one_device(tensor)) for layer in self.layers),
        )

    def sums_over_tensor(self, layout: Layout, *, remat: Remat) -> float:
        """Activations [b, T, D] that a micro-batch sums over `tensor` (the terms: plan/traffic.py).

        Args:
            layout: by which heads of keys are split or stay whole.
            remat: of the run's model.
        """
        # A norm after the residual needs the MLP's result again too, one before it only the attention's.
        again = (1 if self.norm_first else 2) * self.num_layers if remat == "full" else 0
        return 2 + self.num_layers * (2 + self._backward_sums(layout)) + again

    def _backward_sums(self, layout: Layout) -> float:
        """Sums in a layer's backward pass: XLA:CPU does not join those of one input."""
        mlp = 2 if self.gated else 1
        if self.fused_qkv:
            return mlp + 1
        if layout.is_split("kv_heads", self.num_kv_heads):
            return mlp + 3
        return mlp + 1 + 2 * self.num_kv_heads * self.head_dim / self.model_dim


def sizes(config: TransformerConfig) -> dict[str, Any]:
    """The sizes of an Architecture, which every transformer's config has."""
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "model_dim": config.model_dim,
        "num_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_dim": config.hidden_dim,
        "norm_eps": config.norm_eps,
    }
