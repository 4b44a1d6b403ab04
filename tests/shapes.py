"""What jaxtyping's annotations say of arrays is checked in the tests, at every call and of every traced value."""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np

ROOT = Path(__file__).parents[1]


def check_shapes() -> None:
    """From here on, modules of ours that are imported check the arrays that go into their functions and come out.

    Only those with such annotations: a check costs microseconds, and some others are called a million times.
    """
    files = [path for folder in ("dsjax", "pallas_kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    annotated = [path.relative_to(ROOT).with_suffix("") for path in files if "jaxtyping" in path.read_text()]
    modules = [".".join(path.parts) for path in annotated]
    jaxtyping.install_import_hook(modules, "tests.shapes.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with beartype's checks of the annotations that speak of arrays.

    The others are the type checker's: many cannot be checked at run time (protocols, `Self`).
    """
    annotations = {name: kind for name, kind in inspect.get_annotations(function).items() if of_arrays(kind)}
    if not annotations:
        return function
    import beartype

    function.__annotations__ = {name: widened(kind) for name, kind in annotations.items()}
    return beartype.beartype(function)


def of_arrays(annotation: Any) -> bool:
    """Whether an annotation says something of arrays, as a part too: `Float[Array, "B T"] | None`."""
    if isinstance(annotation, typing.TypeAliasType):
        return of_arrays(annotation.__value__)
    return is_array(annotation) or any(of_arrays(part) for part in typing.get_args(annotation))


def is_array(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)


def widened(annotation: Any) -> Any:
    """With NumPy's arrays where JAX's are asked for: JAX takes them so too, and which it is, is no matter of shapes."""
    if isinstance(annotation, typing.TypeAliasType):
        return widened(annotation.__value__)
    if is_array(annotation):
        both = annotation.array_type is jax.Array
        return annotation.dtype[jax.Array | np.ndarray, annotation.dim_str] if both else annotation
    if not of_arrays(annotation):
        return annotation
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(widened, parts))
    if origin in (tuple, list, dict):
        return origin[tuple(map(widened, parts))]
    return annotation
