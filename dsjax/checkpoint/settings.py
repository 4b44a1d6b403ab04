"""Settings in another program's file: each is used, or known to change no number, or refused by name.

A key that is passed over may be the one that decides what a model computes, and nobody would see it: the numbers are
wrong, but they are numbers. So a file of settings (config.json, adapter_config.json, tokenizer_config.json, the
metadata of a GGUF file) is read through `Settings`, which knows what was asked for; the rest must stand in one of two
lists, or is named in a warning.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class UnknownSettings(UserWarning):
    """Keys that nobody here knows were passed over."""


def passed_over(keys: Sequence[str]) -> str:
    """The warning of unknown keys in a model's file."""
    return (
        f"unknown settings, which are passed over: {', '.join(sorted(keys))}; if one of them changes what the model "
        "computes, the numbers here are not that model's"
    )


class Settings:
    """The settings in one file.

    Example:
        >>> free, fixed = {"use_cache": "speed"}, {"scale": (True, None)}
        >>> settings = Settings({"n_layer": 2, "use_cache": False}, "config.json", free=free, fixed=fixed)
        >>> settings.take("num_layers", alias="n_layer"), settings.take("eps", 1e-5)
        (2, 1e-05)
        >>> settings.check()
        >>> Settings({"scale": False}, "config.json", fixed=fixed).check()
        Traceback (most recent call last):
        ValueError: config.json: scale is False, which is not implemented; it must be True or left out
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        *,
        free: Mapping[str, str] | None = None,
        fixed: Mapping[str, tuple[Any, ...]] | None = None,
        unknown: Callable[[Sequence[str]], str] = passed_over,
    ) -> None:
        """Look at `values`.

        Args:
            values: what the file says.
            source: what it is called in messages.
            free: keys that change no number, each with the reason.
            fixed: keys that do, each with the values that are computed, the first for a message; None among them
                means that null is one. A key that is absent has the first or means null.
            unknown: the warning of all other keys, which are given in the file's order.
        """
        self.values, self.source, self._unknown = values, source, unknown
        self._free, self._fixed, self._used = free or {}, fixed or {}, set[str]()

    def take(self, key: str, default: Any = ..., *, alias: str = "") -> Any:
        """A value that is used.

        Args:
            key: its name.
            default: where it is absent.
            alias: another name that it may have.

        Raises:
            KeyError: it is absent and has no default.
            ValueError: it is there under both names, with two values.
        """
        self._used |= {key, alias}
        if alias and alias in self.values:
            if key in self.values and self.values[key] != self.values[alias]:
                raise ValueError(
                    f"{self.source}: {key} is {self.values[key]!r} and {alias} is {self.values[alias]!r}, but the two "
                    "are one setting; remove one of them"
                )
            return self.values[alias]
        return self.values[key] if default is ... else self.values.get(key, default)

    def check(self) -> None:
        """Refuse and name what is left; to be called when all is taken.

        Raises:
            ValueError: keys at values that are not implemented; all are listed.
        """
        wrong = [
            f"{key} is {shown(self.values[key])}, which is not implemented; it must be {shown(allowed[0])} or left out"
            for key, allowed in self._fixed.items()
            if key in self.values and self.values[key] not in allowed
        ]
        if wrong:
            raise ValueError(f"{self.source}: " + "; ".join(wrong))
        known = self._used | self._free.keys() | self._fixed.keys()
        if unknown := [key for key in self.values if key not in known]:
            warnings.warn(f"{self.source}: {self._unknown(unknown)}", UnknownSettings, stacklevel=2)
