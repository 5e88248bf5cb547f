"""`--set key=value` for a sweep or a ladder: its own fields, `runtime.*`, and whatever its runs may override. Strict."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from nanochat_model.config import RuntimeConfig
from nanochat_model.errors import ConfigError
from nanochat_model.overrides import apply_overrides, coerce, dotted_keys
from nanoladder.cells import known_keys, with_overrides
from nanoladder.sweep import Sweep

FIXED = ("name", "question", "source", "purpose", "stage", "metric")  # what a sweep is about cannot be set from outside
T = TypeVar("T")


def apply_settings(target: T, settings: Mapping[str, str]) -> T:
    """A copy of a Sweep or Ladder with `settings` applied. ConfigError names the nearest key of an unknown one."""
    assert dataclasses.is_dataclass(target) and not isinstance(target, type)
    own = [f.name for f in dataclasses.fields(target) if _settable(target, f.name)]
    runtime = [f"runtime.{k}" for k in dotted_keys(RuntimeConfig())]
    config = known_keys()
    changes: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for key, text in settings.items():
        if key in own:
            changes[key] = _own_value(target, key, text)
        elif key in runtime:
            field = key.removeprefix("runtime.")
            current: RuntimeConfig = changes.get("runtime") or target.runtime  # type: ignore[attr-defined]
            changes["runtime"] = apply_overrides(current, {field: text})
        elif key in config:
            overrides[key] = text
        else:
            near = difflib.get_close_matches(key, [*own, *runtime, *config], n=1, cutoff=0.0)
            raise ConfigError(f"--set {key}: no such field; did you mean {near[0]!r}?")
    changed: Any = dataclasses.replace(target, **changes)
    if overrides:
        if isinstance(changed, Sweep):
            changed = with_overrides(changed, overrides)
        else:
            changed = dataclasses.replace(changed, overrides={**changed.overrides, **overrides})
    return typing.cast(T, changed)


def _settable(target: Any, name: str) -> bool:
    value = getattr(target, name)
    return name not in FIXED and (isinstance(value, str | int | float) or name == "seeds")


def _own_value(target: Any, key: str, text: str) -> Any:
    if key == "seeds":
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(f"--set seeds={text}: give whole numbers with commas between, for example seeds=0,1,2") from None
    return coerce(text, getattr(target, key), typing.get_type_hints(type(target))[key], key)
