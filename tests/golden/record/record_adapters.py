"""A LoRA adapter of PEFT under several settings, and the logits of the model with it. See README.md beside this.

    python record_adapters.py ../settings ../adapters

writes the adapter's tensors (of ../settings/gpt2; one module has another rank), cases.json (each a change of
adapter_config.json with its effect: moves, same or refused by dsjax) and logits.npz.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

IDS = np.array([[3, 14, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9]])
CASES = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"c_attn": 1.0, "h.1.mlp.c_fc": 9}},
    {"alpha_pattern": {r"h\.[01]\..*c_fc": 0.5}, "use_rslora": True},
    {"lora_dropout": 0.5},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": False},
    {"init_lora_weights": "pissa"},
    {"inference_mode": True},
]


def main() -> None:
    """Record all cases."""
    base, out = Path(sys.argv[1]) / "gpt2", Path(sys.argv[2])
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["c_attn", "c_fc"], rank_pattern={"h.2.mlp.c_fc": 3}, fan_in_fan_out=True
    )
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    rng = torch.Generator().manual_seed(0)
    tensors = load_file(out / "adapter_model.safetensors")
    tensors = {name: torch.randn(value.shape, generator=rng) * 0.3 for name, value in sorted(tensors.items())}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((out / "adapter_config.json").read_text()) | {"base_model_name_or_path": "gpt2"}
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    found, cases = {}, []
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        for number, change in enumerate(CASES):
            (Path(folder) / "adapter_config.json").write_text(json.dumps(settings | change))
            changed = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), folder).eval()
            with torch.no_grad():
                logits = changed(torch.from_numpy(IDS)).logits.numpy()
            found[str(number)] = logits
            moved = np.abs(logits - found["0"]).max()
            cases.append({"change": change, "effect": "same" if moved < 1e-5 else "moves"})
            print(change, moved)
    (out / "cases.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    np.savez_compressed(out / "logits.npz", ids=IDS, **found)


if __name__ == "__main__":
    main()
