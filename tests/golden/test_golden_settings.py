"""Every key of transformers' config classes at another value: the logits move as theirs do, or the key is refused.

The recordings are described in record/README.md. A key may also be known to change nothing; then theirs do not move.
Tolerance: both compute in float32, logits are of order 1 to 10; 2e-5 of the largest value, as in test_golden_families.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsjax.checkpoint.settings import UnknownSettings
from dsjax.models.families.family import family_of
from dsjax.models.families.registry import FAMILIES
from dsjax.models.formats.config_json import FREE, config_from_hf
from dsjax.models.formats.pretrained import load_pretrained

ROOT = Path(__file__).parent / "settings"
CASES = {path.parent.name: json.loads(path.read_text()) for path in sorted(ROOT.glob("*/cases.json"))}
# Of transformers' refusals those that are only of how its own code is called.
CALLS = {"return_dict"}


@pytest.fixture(scope="module")
def recorded():
    return {family: dict(np.load(ROOT / family / "logits.npz")) for family in CASES}


def folder_of(family, case, path):
    """The family's folder with the case's change."""
    path.mkdir()
    settings = json.loads((ROOT / family / "config.json").read_text()) | case["change"]
    settings = {key: value for key, value in settings.items() if case["change"].get(key, value) is not None}
    (path / "config.json").write_text(json.dumps(settings))
    tensors = load_file(ROOT / family / "model.safetensors")
    if case["tensors"] == "extra":
        tensors |= load_file(ROOT / family / "extra.safetensors")
    elif case["tensors"]:
        del tensors[case["tensors"].removeprefix("without ")]
    save_file(tensors, path / "model.safetensors")
    return path


def test_every_family_is_recorded_with_all_its_keys():
    assert CASES.keys() == FAMILIES.keys()
    assert sum(len(cases) for cases in CASES.values()) > 120
    for family, cases in CASES.items():
        keys = json.loads((ROOT / family / "config.json").read_text()).keys() - {"model_type", "architectures"}
        assert keys <= {case["key"] for case in cases}


@pytest.mark.parametrize("family", CASES)
def test_each_key_counts_or_is_refused_or_changes_nothing(family, recorded, tmp_path):
    free, used, refused = FREE | family_of(family).hugging_face.free, [], []
    want = recorded[family]
    compiled = {}  # of the configs that compute the same
    for number, case in enumerate(CASES[family]):
        path = folder_of(family, case, tmp_path / str(number))
        expected = want.get(str(number), want["base"])
        try:
            config = config_from_hf(json.loads((path / "config.json").read_text()))
            model = compiled.get(config) or load_pretrained(path, segments=(3,) if config.num_layers == 3 else None)
        except ValueError as error:
            assert case["key"] in str(error) or "does not fit the model" in str(error), case
            assert case["effect"] != "same" or case["key"] not in free, case
            refused.append(case["key"])
            continue
        if not case["tensors"]:
            compiled[config] = model
        assert case["effect"] in ("moves", "same") or case["key"] in CALLS, case
        errors = np.abs(np.asarray(model(want["ids"])) - expected)
        assert errors.max() <= 2e-5 * max(1, np.abs(expected).max()), case
        used.append(case["key"])
    assert {"vocab_size", "add_cross_attention"} & set(refused) and "tie_word_embeddings" in used
    if family == "gpt2":
        assert "scale_attn_by_inverse_layer_idx" in used and "scale_attn_weights" in refused


def test_an_unknown_key_is_named_once(tmp_path):
    case = {"change": {"attention_window": 7, "vocab_size": 19}, "tensors": ""}
    path = folder_of("gpt2", case, tmp_path / "model")
    with pytest.warns(UnknownSettings, match=r"unknown settings.*: attention_window; if one") as found:
        load_pretrained(path)
    assert len({str(warning.message) for warning in found}) == 1
    shutil.rmtree(path)
