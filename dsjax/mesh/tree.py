"""The type of trees: nested dicts, tuples and dataclasses of arrays, shapes or specs."""

from typing import Any

Tree = Any
