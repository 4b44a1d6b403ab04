"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

PEFT names a module's factors base_model.model.MODULE.lora_A.weight [r, in] and lora_B.weight [out, r], whatever the
layout of the module's own weight: a fused qkv has one pair, and so has GPT-2's Conv1D, whose weight is [in, out].
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dsjax.checkpoint.manifest import read_json, write_atomically
from dsjax.checkpoint.safetensors_file import TensorInfo, read_header, read_tensor, write_file
from dsjax.checkpoint.tensor_map import Entry, Transform
from dsjax.models.config import LoRAConfig, ModelConfig
from dsjax.models.families import FAMILIES
from dsjax.models.lora import A, Adapter, B, is_adapter

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_LAST = {A: "lora_A", B: "lora_B"}
_CONV1D = {"gpt2"}  # families whose layers keep weights as [in, out]
_TASKS = {"language_model": "CAUSAL_LM", "classification": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}
# Settings of PEFT that change what the tensors mean; each with the value that says no.
_PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


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
    settings = {
        "peft_type": "LORA",
        "task_type": _TASKS[config.task],
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": 0.0,
        "target_modules": _shortest(modules, targets),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": any(modules[stem].in_first for stem in targets),
        "inference_mode": True,
        "init_lora_weights": True,
        **_PLAIN,
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
        ValueError: no such folder, a kind of adapter that is not plain LoRA, or tensors that are unknown, alone or
            misshapen; all are listed.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file() or not (path / TENSOR_FILE).is_file():
        raise ValueError(f"{path} is not an adapter: it needs {CONFIG_FILE} and {TENSOR_FILE} (a pickle is not read)")
    lora = _read_config(path / CONFIG_FILE)
    tensors, problems = {}, []
    known = {f"{_ROOT}{m.name}.{_LAST[last]}.weight": (m, last) for m in _modules(config).values() for last in (A, B)}
    whole = {_ROOT + theirs: (name, entry) for name, (theirs, entry) in _whole_tensors(config).items()}
    for theirs, info in read_header(path / TENSOR_FILE).items():
        try:
            if theirs in known:
                module, last = known[theirs]
                tensors[f"{module.ours}.{last}"] = _to_ours(module, last, _read(info), lora.rank)
            elif theirs in whole:
                name, entry = whole[theirs]
                tensors[name] = np.ascontiguousarray(entry.transform.to_ours(_read(info)))
            else:
                problems.append(f"unknown: {theirs} {list(info.shape)}")
        except ValueError as error:  # also of a reshape that cannot be
            problems.append(f"misshapen: {theirs} {list(info.shape)}: {error}")
    for name in [name for name in tensors if is_adapter(name)]:
        stem, last = name.rsplit(".", 1)
        if f"{stem}.{B if last == A else A}" not in tensors:
            problems.append(f"alone: {name}")
    if problems or not tensors:
        listed = "\n  ".join(problems) or "it is empty"
        raise ValueError(f"{path} does not fit a {config.kind} model ({len(problems)} tensors):\n  {listed}")
    return Adapter(lora, tensors)


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
    """What stands before the names of tensors; classes without a head have no model inside them to give its name."""
    return "" if config.task == "embedding" else FAMILIES[config.kind].PREFIX


def _expanded(config: ModelConfig) -> Iterator[tuple[str, str, Entry]]:
    """(our name, theirs, entry) of every tensor of the base model."""
    for entry in FAMILIES[config.kind].entries(config):
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
            in_first = config.kind in _CONV1D and ours.startswith("layers.")
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


def _read(info: TensorInfo) -> np.ndarray:
    return read_tensor(info).astype(np.float32)


def _shortest(modules: Mapping[str, _Module], targets: set[str]) -> list[str]:
    """Ends of the targets' names that no other module's name has, such as ["q_proj", "v_proj"]; PEFT matches these."""
    others = {module.name for stem, module in modules.items() if stem not in targets}
    found = set()
    for name in (modules[stem].name for stem in targets):
        parts = name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found.add(next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), name))
    return sorted(found)


def _read_config(file: Path) -> LoRAConfig:
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LORA is read")
    other = [
        f"{key} = {settings[key]!r}" for key, plain in _PLAIN.items() if settings.get(key, plain) not in (plain, None)
    ]
    if other:
        raise ValueError(f"{file}: only plain LoRA is read; this one has {', '.join(other)}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float):
        raise ValueError(f"{file}: r must be a whole number and lora_alpha a number; got {rank!r} and {alpha!r}")
    return LoRAConfig(rank=rank, alpha=float(alpha))
