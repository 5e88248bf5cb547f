"""Strict dotted overrides of nested frozen dataclasses: an unknown key is an error that names the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from nanochat_model.errors import ConfigError

T = TypeVar("T")


def dotted_keys(value: Any, prefix: str = "") -> list[str]:
    """Every leaf of a nested dataclass as a dotted key, in the order of the fields."""
    keys: list[str] = []
    for f in dataclasses.fields(value):
        child = getattr(value, f.name)
        if dataclasses.is_dataclass(child):
            keys += dotted_keys(child, f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """{"a.b": "1"} of ("a.b=1",); ConfigError for a part without "=" and for a key given twice."""
    result: dict[str, str] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {item!r} is not of the form key=value; for example --set optimizer.matrix_lr=0.03")
        if key in result:
            raise ConfigError(f"override {key!r} is given twice ({result[key]!r} and {value!r}); keep one")
        result[key] = value
    return result


def apply_overrides(config: T, overrides: Mapping[str, Any]) -> T:
    """A copy of `config` with the dotted keys replaced. Raises ConfigError on an unknown key or a value of another type."""
    if not overrides:
        return config
    known = dotted_keys(config)
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"unknown override {key!r}; did you mean {near[0]!r}?")
    return _apply(config, overrides, "")


def take(overrides: dict[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the keys of `like` from `overrides`; their values, as the types of those in `like`. ConfigError on another type."""
    return {k: coerce(overrides.pop(k), v, type(v), k) for k, v in like.items() if k in overrides}


def _apply(config: Any, overrides: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        child = getattr(config, f.name)
        inner = {k[len(f.name) + 1 :]: v for k, v in overrides.items() if k.startswith(f.name + ".")}
        if f.name in overrides:
            changes[f.name] = coerce(overrides[f.name], child, hints[f.name], prefix + f.name)
        elif inner:
            changes[f.name] = _apply(child, inner, f"{prefix}{f.name}.")
    return dataclasses.replace(config, **changes)


def whole(value: Any) -> int:
    """`value` (perhaps text, perhaps 1e6) as an integer, exactly. Raises ValueError or OverflowError where it is none."""
    try:
        return int(str(value))  # a float would round above 2^53
    except ValueError:
        number = float(value)
        if number != int(number):
            raise
        return int(number)


def coerce(value: Any, current: Any, hint: Any, key: str) -> Any:
    """`value` (perhaps text from a command line) as the type of the field it replaces. Raises ConfigError naming `key`."""
    if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
        raise ConfigError(f"{key} {value!r} must be one of {', '.join(map(repr, typing.get_args(hint)))}")
    try:
        if isinstance(current, bool):
            if str(value).lower() not in ("true", "false", "1", "0"):
                raise ValueError
            return str(value).lower() in ("true", "1")
        if isinstance(current, int):
            return whole(value)
        if isinstance(current, float):
            return float(value)
        if isinstance(current, tuple):
            items = value.split(",") if isinstance(value, str) else value
            if len(items) != len(current):
                raise ValueError
            return tuple(type(c)(v) for c, v in zip(current, items, strict=True))
        return type(current)(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key} {value!r} is not of type {type(current).__name__}, as its current value {current!r}") from None
