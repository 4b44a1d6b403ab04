"""Cases in which an op is held against its reference on random data: on a GPU by experiments/gpu_check.

Every op's folder has a check.py with `checks() -> list[Check]`, one entry a shape and implementation.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import pallas_kernels


class Check(NamedTuple):
    """One case.

    Attributes:
        name: of the op, its shape and dtype.
        implementation: held against the reference, such as 'mosaic'.
        values: number of values, by which a case may be too large to be interpreted.
        error: runs it; the largest error as a share of what rounding allows, at most 1 (nan is no such number).
    """

    name: str
    implementation: str
    values: int
    error: Callable[[], float]


def all_checks() -> list[Check]:
    """The cases of every op, in the order of the ops' names.

    Example:
        >>> [check.name for check in all_checks() if check.implementation == "xla"]
        ['unpack [2, 3, 1024]', 'unpack [8, 5, 131584]']
    """
    found = []
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        if module.ispkg:
            found += importlib.import_module(f"pallas_kernels.{module.name}.check").checks()
    return found
