"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

PEFT names a module's factors base_model.model.MODULE.lora_A.weight [r, in] and lora_B.weight [out, r], whatever the
layout of the module's own weight: a fused qkv has one pair, and so has GPT-2's Conv1D, whose weight is [in, out].
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.finite import finite
from dsjax.checkpoint.manifest import read_json, write_atomically
from dsjax.checkpoint.safetensors_file import TensorInfo, read_header, read_tensor, write_file
from dsjax.checkpoint.settings import Settings
from dsjax.checkpoint.tensor_map import Entry, Transform
from dsjax.layers.weight import A, B
from dsjax.models.adapters import Adapter, is_adapter
from dsjax.models.config import LoRAConfig, ModelConfig
from dsjax.models.families.family import architecture_of, folders_of

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_LAST = {A: "lora_A", B: "lora_B"}
_TASKS = {"language_model": "CAUSAL_LM", "classification": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}
_WHICH = "which modules are adapted: the tensors say it"
_FREE = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), _WHICH),
    **dict.fromkeys(("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"), "a name"),
    **dict.fromkeys(("lora_dropout", "inference_mode", "runtime_config"), "of training"),
    "fan_in_fan_out": "the layout of a weight, which the family knows; tensors for another one are misshapen",
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), "of init_lora_weights"),
    **dict.fromkeys(("megatron_core", "qalora_group_size"), "of a setting that is refused when it is used"),
    "eva_rank": "of init_lora_weights",
}
"""Settings of PEFT that change no number of a model into which the tensors are merged, each with the reason."""
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    # Others (pissa, olora, corda, loftq, lora_ga, mica) have changed the base, too, which W + s A B leaves out.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(("layer_replication", "megatron_config", "trainable_token_indices"), (None, [], {})),
    **dict.fromkeys(("target_parameters", "alora_invocation_tokens", "use_bdlora"), (None, [], False)),
    **dict.fromkeys(("arrow_config", "kasa_config", "velora_config", "monteclora_config"), (None, {})),
}
"""Settings that are refused unless they have one of these values."""


def write_adapter(adapter: Adapter, path: str | Path, *, config: ModelConfig, base: str) -> None:
    """Write a folder that PEFT's `PeftModel.from_pretrained(model, path)` reads.

    Args:
        adapter: what was learned.
        path: a folder that does not exist.
        config: of the base model.
        base: where the base model is, for whoever reads the folder.

    Raises:
        FileExistsError: there is something.
    """
    modules, prefix = _modules(config), _prefix(config)
    tensors, whole = {}, set()
    for name, array in adapter.tensors.items():
        if is_adapter(name):
            stem, last = name.rsplit(".", 1)
            tensors[f"{_ROOT}{modules[stem].name}.{_LAST[last]}.weight"] = _to_theirs(modules[stem], last, array)
        else:
            theirs, entry = _whole_tensors(config)[name]
            tensors[_ROOT + theirs] = np.ascontiguousarray(entry.transform.to_theirs(array))
            whole.add(theirs.removeprefix(prefix).split(".")[0])
    targets = {name.rpartition(".")[0] for name in adapter.tensors if is_adapter(name)}
    found = {}  # module -> rank and alpha
    for stem in targets:
        rank = adapter.tensors[f"{stem}.{A}"].shape[1]
        found[modules[stem].name] = rank, adapter.scales.get(stem, adapter.config.scale) * rank
    settings = {
        "peft_type": "LORA",
        "task_type": _TASKS[config.task],
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "use_rslora": False,
        "rank_pattern": {name: rank for name, (rank, _) in found.items() if rank != adapter.config.rank},
        "alpha_pattern": {name: alpha for name, (_, alpha) in found.items() if alpha != adapter.config.alpha},
        "use_dora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "target_modules": _shortest(modules, targets),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": any(modules[stem].in_first for stem in targets),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    path = Path(path)
    path.mkdir(parents=True)
    write_file(path / TENSOR_FILE, tensors, metadata={"format": "pt"})
    write_atomically(path / CONFIG_FILE, json.dumps(settings, indent=2).encode() + b"\n")


def read_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in a folder that PEFT or `write_adapter` has written.

    Args:
        path: the folder.
        config: of the model that it is for.

    Raises:
        ValueError: no such folder, a kind of adapter that is not LoRA or changes more than W + s A B, or tensors that
            are unknown, alone or misshapen (all are listed) or not finite.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file() or not (path / TENSOR_FILE).is_file():
        raise ValueError(f"{path} is not an adapter: it needs {CONFIG_FILE} and {TENSOR_FILE} (a pickle is not read)")
    whole = {_ROOT + theirs: (name, entry) for name, (theirs, entry) in _whole_tensors(config).items()}
    (embedding,) = [theirs for theirs, (name, _) in whole.items() if name == "embed.table"]
    settings = _read_config(path / CONFIG_FILE, embedding.removesuffix(".weight"))
    tensors, problems, scales = {}, [], {}
    known = {f"{_ROOT}{m.name}.{_LAST[last]}.weight": (m, last) for m in _modules(config).values() for last in (A, B)}
    for theirs, info in read_header(path / TENSOR_FILE).items():
        if theirs not in known and theirs not in whole:
            problems.append(f"unknown: {theirs} {list(info.shape)}")
            continue
        array = _read(theirs, info)
        try:
            if theirs in known:
                module, last = known[theirs]
                tensors[f"{module.ours}.{last}"] = _to_ours(module, last, array, settings.rank_of(module.name))
                if (scale := settings.scale_of(module.name)) != settings.lora.scale:
                    scales[module.ours] = scale
            else:
                name, entry = whole[theirs]
                tensors[name] = np.ascontiguousarray(entry.transform.to_ours(array))
        except ValueError as error:  # also of a reshape that cannot be
            problems.append(f"misshapen: {theirs} {list(info.shape)}: {error}")
    for name in [name for name in tensors if is_adapter(name)]:
        stem, last = name.rsplit(".", 1)
        if f"{stem}.{B if last == A else A}" not in tensors:
            problems.append(f"alone: {name}")
    if problems or not tensors:
        listed = "\n  ".join(problems) or "it is empty"
        raise ValueError(f"{path} does not fit a {config.kind} model ({len(problems)} tensors):\n  {listed}")
    if "embed.table" in tensors and _head_follows_embedding(config) and not settings.ties:
        raise ValueError(
            f"{path}: the adapter has an embedding of its own, but the base's logits keep the old one "
            "(ensure_weight_tying is not set), so that the two are no longer tied; such a model cannot be merged"
        )
    return Adapter(settings.lora, tensors, scales)


def _head_follows_embedding(config: ModelConfig) -> bool:
    return config.task == "language_model" and architecture_of(config).tied


@dataclasses.dataclass(frozen=True)
class _Module:
    """A linear module of the base model."""

    name: str
    """transformers' name: transformer.h.0.attn.c_attn."""
    ours: str
    """Ours: layers.0.attention.qkv."""
    transform: Transform
    """Of its weight."""
    in_first: bool
    """Whether its weight is [in, out]."""


def _prefix(config: ModelConfig) -> str:
    """The prefix of tensor names."""
    return folders_of(config).prefix_for(config.task)


def _expanded(config: ModelConfig) -> Iterator[tuple[str, str, Entry]]:
    """(our name, theirs, entry) of every tensor of the base model."""
    for entry in folders_of(config).entries(config):
        theirs = (_prefix(config) if entry.prefixed else "") + entry.theirs
        for i in range(config.num_layers) if "{i}" in theirs else (0,):
            number = str(i)
            yield ".".join(entry.ours).replace("{i}", number), theirs.replace("{i}", number), entry


def _modules(config: ModelConfig) -> dict[str, _Module]:
    """Our name without .kernel -> the module."""
    found = {}
    for ours, theirs, entry in _expanded(config):
        if ours.endswith(".kernel"):
            stem = ours.removesuffix(".kernel")
            in_first = folders_of(config).kernels_in_first and ours.startswith("layers.")
            found[stem] = _Module(theirs.removesuffix(".weight"), stem, entry.transform, in_first)
    return found


def _whole_tensors(config: ModelConfig) -> dict[str, tuple[str, Entry]]:
    """Our name -> theirs, and how it is turned, of tensors outside the layers."""
    return {ours: (theirs, entry) for ours, theirs, entry in _expanded(config) if not ours.startswith("layers.")}


def _to_theirs(module: _Module, last: str, array: np.ndarray) -> np.ndarray:
    """A factor in PEFT's layout: A [D, r] -> [r, D], B [r, ...] -> [out, r]."""
    if last == B:  # B is a kernel with r inputs
        array = module.transform.to_theirs(array)
    return np.ascontiguousarray(array if last == B and not module.in_first else array.T, np.float32)


def _to_ours(module: _Module, last: str, array: np.ndarray, rank: int) -> np.ndarray:
    """And back."""
    if array.ndim != 2 or array.shape[last == B] != rank:
        raise ValueError(f"expected {'[out, r]' if last == B else '[r, in]'} with r = {rank}")
    array = array if last == B and not module.in_first else array.T
    return np.ascontiguousarray(module.transform.to_ours(array) if last == B else array)


def _read(name: str, info: TensorInfo) -> np.ndarray:
    return finite(read_tensor(info).astype(np.float32), name, where=info.file)


def _shortest(modules: Mapping[str, _Module], targets: set[str]) -> list[str]:
    """Ends of the targets' names that no other module's name has, such as ["q_proj", "v_proj"]; PEFT matches these."""
    others = {module.name for stem, module in modules.items() if stem not in targets}
    found = set()
    for name in (modules[stem].name for stem in targets):
        parts = name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found.add(next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), name))
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Settings of the tensors in adapter_config.json."""

    lora: LoRAConfig
    """Rank and alpha of most modules."""
    ranks: Mapping[str, int]
    """Regular expression of the end of a module's name -> its rank."""
    alphas: Mapping[str, float]
    """The same for alpha."""
    stable: bool
    """Rank-stabilised LoRA (arXiv 2312.03732): alpha / sqrt(rank) in place of alpha / rank."""
    ties: bool
    """Whether an embedding that was trained whole is also the table of the logits."""

    def rank_of(self, module: str) -> int:
        """r of a module."""
        return self.ranks.get(_first_match(self.ranks, module), self.lora.rank)

    def scale_of(self, module: str) -> float:
        """The factor of a module's part."""
        rank, alpha = self.rank_of(module), self.alphas.get(_first_match(self.alphas, module), self.lora.alpha)
        return alpha / (math.sqrt(rank) if self.stable else rank)


def _first_match(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's rule: the first pattern that matches the whole name or what is behind one of its dots."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")


def _read_config(file: Path, embedding: str) -> _Settings:
    """The settings of an adapter to a base that calls its embedding so."""
    settings = Settings(read_json(file), str(file), free=_FREE, fixed=_FIXED)
    rank, alpha = settings.take("r", None), settings.take("lora_alpha", None)
    ranks, alphas = settings.take("rank_pattern", None) or {}, settings.take("alpha_pattern", None) or {}
    stable = bool(settings.take("use_rslora", False))
    # The base's own embedding may be among the tensors (save_embedding_layers); only one that is said to be trained
    # stands beside the base's in PEFT.
    whole = [str(name) for name in settings.take("modules_to_save", None) or []]
    embeds = any(f".{embedding}".endswith(f".{name}") for name in whole)
    ties = bool(settings.take("ensure_weight_tying", False)) or not embeds
    if "peft_type" not in settings.values:
        raise ValueError(f"{file}: there is no peft_type; only adapters of the type LORA are read")
    settings.check()
    numbers = all(type(value) is int for value in (rank, *ranks.values()))
    if not numbers or not all(isinstance(value, int | float) for value in (alpha, *alphas.values())):
        raise ValueError(
            f"{file}: r and rank_pattern must be whole numbers, lora_alpha and alpha_pattern numbers; got {rank!r}, "
            f"{ranks!r}, {alpha!r} and {alphas!r}"
        )
    return _Settings(LoRAConfig(rank=rank, alpha=float(alpha)), ranks, alphas, stable, ties)
