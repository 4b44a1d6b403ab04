"""A LoRA adapter of PEFT under several settings, merged: the logits are those that PEFT 0.21 computes with it.

Recorded by record/record_adapters.py. Tolerance: 2e-5 of the largest logit, as in test_golden_families; a merged
product is rounded once more than PEFT's, which adds it to the output.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dsjax.models.adapters import merged
from dsjax.models.families.build import segments_of
from dsjax.models.formats.peft import read_adapter, write_adapter
from dsjax.models.formats.pretrained import load_pretrained

HERE = Path(__file__).parent
CASES = json.loads((HERE / "adapters" / "cases.json").read_text())


@pytest.fixture(scope="module")
def base():
    return load_pretrained(HERE / "settings" / "gpt2", segments=(3,))


def with_adapter(base, adapter):
    params = merged(nnx.to_pure_dict(nnx.state(base, nnx.Param)), adapter, segments_of(base.config))
    return nnx.merge(nnx.graphdef(base), params)


def adapter_of(change, path):
    path.mkdir()
    (path / "adapter_model.safetensors").symlink_to(HERE / "adapters" / "adapter_model.safetensors")
    settings = json.loads((HERE / "adapters" / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | change))
    return path


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: json.dumps(CASES[number]["change"]))
def test_logits(number, base, tmp_path):
    recorded = np.load(HERE / "adapters" / "logits.npz")
    change, effect, want = CASES[number]["change"], CASES[number]["effect"], recorded[str(number)]
    path = adapter_of(change, tmp_path / "a")
    if change.get("init_lora_weights") == "pissa":
        assert effect == "moves"
        with pytest.raises(ValueError, match=r"init_lora_weights is 'pissa', which is not implemented"):
            read_adapter(path, base.config)
        return
    adapter = read_adapter(path, base.config)
    tolerance = 2e-5 * np.abs(want).max()
    assert (np.abs(want - recorded["0"]).max() > 100 * tolerance) == (effect == "moves")
    np.testing.assert_allclose(with_adapter(base, adapter)(recorded["ids"]), want, atol=tolerance)
    # Written again it is the same adapter, its ranks and scales among it.
    write_adapter(adapter, tmp_path / "b", config=base.config, base="gpt2")
    again = read_adapter(tmp_path / "b", base.config)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (path, tmp_path / "b"))
    assert old.keys() == new.keys() and all((old[name] == new[name]).all() for name in old)
    np.testing.assert_allclose(with_adapter(base, again)(recorded["ids"]), want, atol=tolerance)
