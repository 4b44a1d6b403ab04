"""The other side: transformers, as its documentation says. Runs without dsjax."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from side_by_side import serve


def load(path: str, threads: int, platform: str):
    torch.set_num_threads(threads)
    device = "cuda" if platform == "gpu" else "cpu"
    dtype = torch.bfloat16 if platform == "gpu" else torch.float32
    file = Path(path)
    began = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    model = model.to(device).eval()
    load_seconds = time.perf_counter() - began

    def about() -> dict[str, Any]:
        return {
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "threads": torch.get_num_threads(),
            "attention": model.config._attn_implementation,
            "load_seconds": load_seconds,
        }

    def run(tokens: list[list[int]], new_tokens: int) -> dict[str, Any]:
        ids = torch.tensor(tokens, device=device)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=2,
            )
        return {"tokens": made[:, ids.shape[1] :].tolist()}

    return {"about": about, "run": run}


if __name__ == "__main__":
    serve(load)
