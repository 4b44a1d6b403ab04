"""Our side: the model and the tokens as `dsjax generate` uses them."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from side_by_side import serve

from dsjax.inference.open import open_model
from dsjax.mesh.build import set_platform
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.processes import use_compilation_cache


def load(path: str, threads: int, platform: str):
    set_platform(MeshConfig(platform=platform))
    use_compilation_cache()
    began = time.perf_counter()
    trained = open_model(Path(path), report=print)
    model = trained.model
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.block_until_ready(params)
    load_seconds = time.perf_counter() - began

    def about() -> dict[str, Any]:
        return {
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
            "device": jax.devices()[0].device_kind,
            "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
            "load_seconds": load_seconds,
        }

    def run(tokens: list[list[int]], new_tokens: int) -> dict[str, Any]:
        made = model.generate(np.array(tokens), max_new_tokens=new_tokens)
        return {"tokens": made[:, len(tokens[0]) :].tolist()}

    def bandwidth(repeats: int, threads: int = threads) -> dict[str, Any]:
        """Bytes per second at which so many threads read as much memory as the weights take; the best repeat."""
        size = sum(x.nbytes for x in jax.tree.leaves(params)) // 8
        parts = np.array_split(np.arange(size, dtype=np.int64), threads)
        best = 0.0
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(repeats):
                start = time.perf_counter()
                list(pool.map(np.bitwise_or.reduce, parts))
                best = max(best, 8 * size / (time.perf_counter() - start))
        return {"bytes_per_second": best}

    encode = lambda text: {"tokens": trained.tokenizer.encode(text)}
    return {"about": about, "run": run, "bandwidth": bandwidth, "encode": encode}


if __name__ == "__main__":
    serve(load)
