"""Tiny random models of each family, and what transformers computes with them in float64. See README.md beside this.

    python record_families.py ../families

writes per model a Hugging Face folder (float32 weights, config.json) with golden.npz in it. Keys of golden.npz, for the
cases `full` (no padding), `left` and `right` (the same texts with padding on that side):

    <case>/{input_ids,attention_mask,position_ids,labels,token_type_ids}   the inputs; labels of -100 do not count
    <case>/{logits,loss}          outputs ([rows, positions, vocabulary] or [rows, classes])
    <case>/{hidden,pooled}        of BertModel; its loss is their product with `weigh/{hidden,pooled}`
    <case>/grad/<tensor>          the loss's gradient for every tensor of the folder, under its name there
    <case>/{greedy,margin}        new tokens, and by how much each was preferred to the next best (causal models)
    full/bf16_{logits,hidden,pooled}   the same model in bfloat16

All is computed in float64 from the float32 weights; outputs and gradients are then rounded to float32.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, GPT2Config, LlamaConfig

LENGTHS, NEW, PAD = (9, 6, 3), 8, 0
LLAMA = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": PAD}
LLAMA |= {"max_position_embeddings": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
BERT = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
BERT |= {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, "pad_token_id": PAD}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1000.0}

MODELS = {
    "llama_6x2_tied": ("LlamaForCausalLM", LlamaConfig, LLAMA | {"tie_word_embeddings": True}),
    "llama_8x2": (
        "LlamaForCausalLM",
        LlamaConfig,
        LLAMA | {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 8},
    ),
    "llama_4x4_llama3": (
        "LlamaForCausalLM",
        LlamaConfig,
        LLAMA
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "rope_parameters": LLAMA3}
        | {"max_position_embeddings": 512},
    ),
    "llama_6x3_linear": (
        "LlamaForCausalLM",
        LlamaConfig,
        LLAMA | {"num_key_value_heads": 3, "head_dim": 6, "rope_parameters": LINEAR, "tie_word_embeddings": True},
    ),
    "llama_classes": ("LlamaForSequenceClassification", LlamaConfig, LLAMA | {"num_labels": 3}),
    "gpt2_6": ("GPT2LMHeadModel", GPT2Config, GPT2),
    "bert_masked": ("BertForMaskedLM", BertConfig, BERT),
    "bert_classes": ("BertForSequenceClassification", BertConfig, BERT | {"num_labels": 3}),
    "bert_vectors": ("BertModel", BertConfig, BERT),
}


@contextlib.contextmanager
def everything_float64():
    """transformers computes norms, softmax, RoPE and losses in float32 whatever the model is; here it cannot."""

    class NoFloat32(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                assert not isinstance(leaf, torch.Tensor) or leaf.dtype not in NARROW, f"{func} gave {leaf.dtype}"
            return out

    old = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        with NoFloat32():
            yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = old
        torch.set_default_dtype(torch.float32)


NARROW = (torch.float32, torch.bfloat16, torch.float16)


def make_weights(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """float32 values for every parameter: no bias is zero, no norm is one, logits are of order 1 and more."""
    rng, values = np.random.default_rng(seed), {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        draw = rng.standard_normal(shape)
        if len(shape) == 1:
            value = 0.2 * draw + (1.0 if "norm" in name.lower() or ".ln_" in name else 0.0) * (
                not name.endswith("bias")
            )
        else:
            value = draw * (0.7 if "emb" in name or ".wte" in name or ".wpe" in name else 1.5 / shape[-1] ** 0.5)
        values[name] = value.astype(np.float32)
    return values


def build(name: str, values: dict[str, np.ndarray] | None, dtype: torch.dtype) -> torch.nn.Module:
    """The model with these weights, in evaluation mode, with attention written out."""
    cls, config_cls, options = MODELS[name]
    config = config_cls(**options, attn_implementation="eager")
    model = getattr(transformers, cls)(config).to(dtype).eval()
    if values is not None:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(values[key].astype(np.float64)).to(dtype))
    return model


def make_cases(name: str, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """The inputs. Real tokens are never the padding token, whose row torch gives no gradient."""
    cls, _, options = MODELS[name]
    vocab, longest = options["vocab_size"], max(LENGTHS)
    full = rng.integers(1, vocab, (len(LENGTHS), longest))
    texts = [rng.integers(1, vocab, n) for n in LENGTHS]
    classes = rng.integers(0, 3, len(LENGTHS))

    def arrange(rows: list[np.ndarray], side: str) -> dict[str, np.ndarray]:
        ids, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), np.int64)
        labels, types, positions = np.full_like(ids, -100), np.zeros_like(ids), np.zeros_like(ids)
        for row, text in enumerate(rows):
            at = slice(longest - len(text), None) if side == "left" else slice(0, len(text))
            ids[row, at], mask[row, at], positions[row, at] = text, 1, np.arange(len(text))
            types[row, at] = np.arange(len(text)) >= len(text) // 2
            # The first token of a text is nobody's target: on the left padding would have to predict it.
            counted = np.arange(len(text)) % 3 == 1 if cls == "BertForMaskedLM" else np.arange(len(text)) > 0
            labels[row, at] = np.where(counted, (text * 7 + 3) % vocab if cls == "BertForMaskedLM" else text, -100)
        case = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if cls.startswith("Bert"):
            case["token_type_ids"] = types
        if "Classification" in cls:
            case["labels"] = classes
        elif cls != "BertModel":
            case["labels"] = labels
        return case

    return {"full": arrange(list(full), "right"), "left": arrange(texts, "left"), "right": arrange(texts, "right")}


def run(name: str, model: torch.nn.Module, case: dict[str, torch.Tensor], weigh: dict[str, torch.Tensor]):
    """Outputs and loss."""
    cls = MODELS[name][0]
    if not cls.startswith("Bert") or cls == "BertForMaskedLM":
        inputs = dict(case)
        if cls == "LlamaForSequenceClassification":
            inputs["use_cache"] = False
        out = model(**inputs)
        return {"logits": out.logits}, out.loss
    inputs = {key: value for key, value in case.items() if key != "labels"}
    bert = model if cls == "BertModel" else model.bert
    hidden = bert(**inputs).last_hidden_state
    # transformers pools the first place, which is padding on the left; what is meant is the first token.
    first = hidden[torch.arange(len(hidden)), case["attention_mask"].argmax(1)]
    pooled = bert.pooler(first[:, None])
    if cls == "BertModel":
        if bool(case["attention_mask"][:, 0].all()):
            assert torch.equal(model(**inputs).pooler_output, pooled)
        real = case["attention_mask"][..., None] * weigh["hidden"]
        return {"hidden": hidden, "pooled": pooled}, (hidden * real).sum() + (pooled * weigh["pooled"]).sum()
    logits = model.classifier(pooled)
    if bool(case["attention_mask"][:, 0].all()):
        theirs = model(**case)
        assert torch.equal(theirs.logits, logits)
    return {"logits": logits}, torch.nn.functional.cross_entropy(logits, case["labels"])


def greedy(model: torch.nn.Module, case: dict[str, torch.Tensor], side: str):
    """New tokens [rows, NEW] and margins; texts padded on the right are continued alone, without their padding."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    model.generation_config.eos_token_id = None
    rows = [(case["input_ids"], case["attention_mask"])]
    if side == "right":
        rows = [
            (ids[mask == 1][None], torch.ones_like(ids[mask == 1])[None])
            for ids, mask in zip(case["input_ids"], case["attention_mask"], strict=True)
        ]
    tokens, margins = [], []
    for ids, mask in rows:
        out = model.generate(ids, attention_mask=mask, **settings)
        tokens.append(out.sequences[:, ids.shape[1] :].numpy())
        best = torch.stack(out.logits, 1).topk(2, -1).values
        margins.append((best[..., 0] - best[..., 1]).numpy())
    tokens, margins = np.concatenate(tokens), np.concatenate(margins)
    assert tokens.shape == (len(LENGTHS), NEW) and margins.min() > 1e-3, f"choose another seed: {margins.min()}"
    return tokens, margins


def record(name: str, folder: Path, seed: int) -> None:
    """One model's folder."""
    rng, cls = np.random.default_rng(seed), MODELS[name][0]
    plain = build(name, None, torch.float32)
    values = make_weights(plain, seed)
    plain = build(name, values, torch.float32)
    shutil.rmtree(folder, ignore_errors=True)
    plain.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    cases = make_cases(name, rng)
    width = MODELS[name][2].get("hidden_size", 0)
    weigh = {"hidden": rng.standard_normal(width), "pooled": rng.standard_normal(width)} if cls == "BertModel" else {}
    found: dict[str, np.ndarray] = {f"weigh/{key}": value for key, value in weigh.items()}
    bf16 = build(name, values, torch.bfloat16)
    with everything_float64():
        model = build(name, values, torch.float64)
        tensors = {key: torch.from_numpy(value) for key, value in weigh.items()}
        for side, arrays in cases.items():
            found |= {f"{side}/{key}": value.astype(np.int32) for key, value in arrays.items()}
            case = {key: torch.from_numpy(value) for key, value in arrays.items()}
            model.zero_grad(set_to_none=True)
            out, loss = run(name, model, case, tensors)
            loss.backward()
            found |= {f"{side}/{key}": value.detach().numpy() for key, value in out.items()}
            found[f"{side}/loss"] = np.float64(loss.item())
            for key, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"{side}/grad/{key}"] = parameter.grad.numpy().copy()
            if cls in ("LlamaForCausalLM", "GPT2LMHeadModel"):
                found[f"{side}/greedy"], found[f"{side}/margin"] = greedy(model, case, side)
    case = {key: torch.from_numpy(value) for key, value in cases["full"].items()}
    half = {key: torch.from_numpy(value).to(torch.bfloat16) for key, value in weigh.items()}
    for key, value in run(name, bf16, case, half)[0].items():
        found[f"full/bf16_{key}"] = value.detach().float().numpy()
    check(found)
    narrow = lambda key, x: x.astype(np.float32) if x.dtype == np.float64 and not key.endswith("loss") else x
    np.savez_compressed(folder / "golden.npz", **{key: narrow(key, np.asarray(x)) for key, x in found.items()})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: {size / 1e3:.0f} kB, loss {float(found['full/loss']):.4f}")


def check(found: dict[str, np.ndarray]) -> None:
    """Texts padded on the left and on the right give one loss and one gradient."""
    assert abs(found["left/loss"] - found["right/loss"]) < 1e-10
    for key, value in found.items():
        if key.startswith("left/grad/"):
            assert np.abs(value - found["right" + key.removeprefix("left")]).max() < 1e-10, key
    if "left/greedy" in found:
        assert (found["left/greedy"] == found["right/greedy"]).all()


def main() -> None:
    """Record all models."""
    root = Path(sys.argv[1])
    for number, name in enumerate(MODELS):
        record(name, root / name, seed=number)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    (root / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
