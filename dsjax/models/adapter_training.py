"""LoRA in a run: which tensors are trained and which are frozen, where they come from, what a checkpoint says of them.

Trained are the adapters and the tensors that the base lacks for the task (a new classifier). A checkpoint holds these
alone, with their optimizer state: a thousandth of the model. The base is named in config.yaml (model.init_from); the
hash of its weights, in data.json, says whether it is still the same, so that an adapter never meets another base.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsjax.checkpoint.manifest import read_json
from dsjax.layers.weight import BASE, A
from dsjax.mesh.layout import Layout
from dsjax.models.adapters import Adapter, initial_adapters, is_adapter, merged, with_adapters, with_weights
from dsjax.models.config import LoRAConfig, ModelConfig
from dsjax.models.families.build import abstract, segments_of
from dsjax.models.formats.pretrained import initial_weights, lacking, load_params, open_weights, weights_hash
from dsjax.models.tree import ModelTree, Tree, joined, part_of

DATA_FILE = "data.json"


def split_model(config: ModelConfig, lora: LoRAConfig | None) -> tuple[ModelTree, ModelTree | None]:
    """The trained part and the frozen part, which is None when everything is trained.

    Raises:
        ValueError: there is nothing to adapt (no init_from), or no kernel matches.
    """
    if lora is None:
        return ModelTree.of(abstract(config)).split()
    if not config.init_from:
        raise ValueError("lora adapts weights that exist: give model.init_from, a Hugging Face folder or a GGUF file")
    return ModelTree.of(with_adapters(abstract(config), lora)).split(_is_trained(config))


def _is_trained(config: ModelConfig) -> Callable[[str], bool]:
    new = lacking(config)
    return lambda name: is_adapter(name) or name.startswith("classifier.") or name in new


def first_params(config: ModelConfig, trained: ModelTree, layout: Layout, *, seed: int) -> tuple[Tree, Tree]:
    """Trained and frozen parameters before the first step, float32 on their shards.

    Args:
        config: the model; its init_from is read, each tensor straight onto its devices.
        trained: from `split_model`.
        layout: the placement.
        seed: of A and of a new head.
    """
    base = ModelTree.of(abstract(config))
    specs = base.specs(layout.parameter)
    weights = initial_weights(config, shardings=jax.tree.map(layout.named, specs), seed=seed)
    is_trained = _is_trained(config)
    adapters = trained.part(is_adapter)
    draw = jax.jit(
        partial(initial_adapters, adapters.shapes, segments_of(config)),
        out_shardings=jax.tree.map(layout.named, adapters.specs(layout.parameter)),
    )
    weights = _under_adapters(weights, adapters.shapes)
    heads = part_of(weights, is_trained)
    return joined(heads, draw(jax.random.key(seed))), part_of(weights, lambda name: not is_trained(name))


def _under_adapters(weights: Tree, adapters: Tree) -> Tree:
    """Parameters of a plain model where one with adapters has them."""
    if A in adapters:
        return {BASE: weights}
    if isinstance(weights, dict):
        return {key: _under_adapters(branch, adapters.get(key, {})) for key, branch in weights.items()}
    return weights


def folded(
    config: ModelConfig, lora: LoRAConfig, params: Tree, frozen: Tree, *, layout: Layout
) -> tuple[ModelTree, Tree]:
    """The model without adapters, and its parameters with W + (alpha / r) A B in their place, in new buffers."""
    model, graph = ModelTree.of(abstract(config)), ModelTree.of(with_adapters(abstract(config), lora)).graph
    shardings = jax.tree.map(layout.named, model.specs(layout.parameter))

    def fold(params: Tree, frozen: Tree) -> Tree:
        whole = with_weights(nnx.merge(graph, joined(params, frozen)), lambda _: True, lambda weight: weight.merged())
        return nnx.to_pure_dict(nnx.state(whole, nnx.Param))

    return model, jax.jit(fold, out_shardings=shardings)(params, frozen)


def base_of_run(config: ModelConfig, resumed: Path | None) -> dict[str, Any]:
    """Entries of data.json about the base; the folder of a resumed run must have the same already.

    Raises:
        ValueError: as `check_base`.
    """
    if resumed is not None:
        check_base(resumed, config)
        return {}
    return {"base": {"path": config.init_from, "sha256": weights_hash(config.init_from)}}


def check_base(folder: Path, config: ModelConfig) -> None:
    """Refuse a base that is not the one that a run's adapters were trained on.

    Raises:
        ValueError: the weights are gone or other ones.
    """
    base = read_json(folder / DATA_FILE).get("base", {})
    if base.get("sha256") != weights_hash(config.init_from):
        raise ValueError(
            f"{config.init_from} is not the base of the adapters in {folder}: its weights have changed; give the ones "
            f"that were there, or start a new run"
        )


def applied(config: ModelConfig, lora: LoRAConfig, tensors: Mapping[str, np.ndarray]) -> tuple[Tree, Adapter]:
    """The whole model's parameters on the first device with trained tensors merged into them, and these as an adapter.

    Args:
        config: the model, with init_from.
        lora: as it was trained.
        tensors: the trained ones by name.
    """
    adapter = Adapter(lora, tensors)
    base = load_params(open_weights(config.init_from), config, seed=0)  # what is drawn here is replaced
    return merged(base, adapter, segments_of(config)), adapter
