"""GPU kernels for JAX, each with an XLA reference that is also the CPU path. Imports jax and jaxtyping only.

One folder per op: `api.py` (what one calls), `reference.py` (XLA), `mosaic.py` (Mosaic GPU), `shapes.py` (what fits),
`check.py` (cases to hold against the reference on a GPU, see checks.py), `bench.py` (time against memory bandwidth).
Every op takes `implementation='auto' | 'xla' | 'mosaic'`; see platform.py.

* `sign_pack`, `unpack_average`, `unpack`: the three phases of a one-bit all-reduce with error feedback.
"""

from pallas_kernels.sign_pack.api import sign_pack, unpack, unpack_average

__all__ = ["sign_pack", "unpack", "unpack_average"]
