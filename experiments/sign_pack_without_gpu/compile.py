"""Compiles the kernels for an H200 without having one. For run.py, in an environment that has JAX's CUDA plugin.

Reads cases as JSON from stdin; on stdout, after a line `== name` each, Mosaic GPU prints the PTX (MOSAIC_GPU_DUMP_PTX).
"""

import functools
import json
import os
import sys

# Before JAX starts: its checks look for CUDA libraries and for a device, of which compiling needs neither.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels

# As XLA describes an H200 (xla/backends/gpu/target_config/specs/h200.txtpb), as far as the compiler asks.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  fpus_per_core: 128  clock_rate_ghz: 1.98  memory_bandwidth: 4800000000000  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_memory_size: 151397597184  device_address_bits: 64  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H200"  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


def whole(shape: list[int], dtype: str, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)


def main() -> None:
    # JAX asks for a running client to tell 'gpu' from 'cuda' (github.com/jax-ml/jax/issues/23971).
    canonical = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name in ("gpu", "cuda") else canonical(name)
    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=H200)
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())
    for case in json.load(sys.stdin):
        array = functools.partial(whole, sharding=sharding)
        values, tensors = (case["tensors"], case["size"]), (case["tensors"],)
        keywords = {"mask": array(values, "int8")} if case["masked"] else {}
        if case["length"] is not None:
            keywords["length"] = array((), "int32")
        if case["op"] == "sign_pack":
            op, inputs = pallas_kernels.sign_pack, [array(values, case["dtype"])]
        else:
            per_worker = (case["workers"], case["tensors"])
            op = pallas_kernels.unpack_average
            inputs = [array((*per_worker, case["size"] // 8), "uint8"), array(per_worker, "float32")]
        kernel = jax.jit(functools.partial(op, implementation="mosaic"), donate_argnames="carry")
        print(f"== {case['name']}", flush=True)
        traced = kernel.trace(*inputs, carry=array(values, "float32"), scale=array(tensors, "float32"), **keywords)
        traced.lower(lowering_platforms=("cuda",)).compile()


if __name__ == "__main__":
    main()
