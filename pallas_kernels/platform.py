"""Which implementation an op runs with: 'auto' chooses and says so once, a name asked for is never replaced."""

import functools
import logging

import jax

log = logging.getLogger("pallas_kernels")


def choose(op: str, implementation: str, *, kernels: tuple[str, ...] = ("mosaic",)) -> str:
    """'xla' or one of an op's kernels; a line in the log `pallas_kernels` (INFO) the first time that 'auto' chose.

    'auto' is XLA everywhere: the tests interpret the Mosaic kernels and lower them for CUDA, and an emulator has run
    their PTX (experiments/sign_pack_without_gpu), but no GPU has yet, so none runs unless it is asked for. 'mosaic' is
    taken also on a host without a GPU: that is how a program is lowered for CUDA there; compiling it for a CPU
    fails in JAX.

    Raises:
        ValueError: for another name.

    Example:
        >>> choose("sign_pack", "mosaic")
        'mosaic'
        >>> choose("sign_pack", "fast")
        Traceback (most recent call last):
        ...
        ValueError: implementation 'fast' of sign_pack: must be one of 'auto', 'xla', 'mosaic'
    """
    allowed = ("auto", "xla", *kernels)
    if implementation not in allowed:
        raise ValueError(f"implementation {implementation!r} of {op}: must be one of {', '.join(map(repr, allowed))}")
    if implementation != "auto":
        return implementation
    _say_once(op, jax.default_backend())
    return "xla"


@functools.cache
def _say_once(op: str, backend: str) -> None:
    hint = "" if backend == "cpu" else "; implementation='mosaic' asks for the kernel, which has not run on a GPU yet"
    log.info("%s: implementation 'auto' chose 'xla' on %s%s", op, backend, hint)
