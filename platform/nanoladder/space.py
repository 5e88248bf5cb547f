"""The dimensions of a search space. Plain data: Optuna's distributions are made from them in `study`.

Keys of a space are what `Recipe.resolve` takes as overrides: `batch_tokens`, `lr_multiplier`, `weight_decay_multiplier`,
or any dotted key of a TrainConfig.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from nanochat_model.errors import ConfigError

Value: TypeAlias = int | float | str | bool


@dataclass(frozen=True)
class Grid:
    """Every one of `values`, all numbers, in the order given."""

    values: tuple[int | float, ...]

    def __init__(self, values: Iterable[int | float]) -> None:
        object.__setattr__(self, "values", tuple(values))
        _require_options("Grid", self.values)
        for value in self.values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ConfigError(f"Grid value {value!r} must be a finite number; use Choice for anything else")


@dataclass(frozen=True)
class Choice:
    """One of `options`, which have no order (names, flags)."""

    options: tuple[Value, ...]

    def __init__(self, options: Iterable[Value]) -> None:
        object.__setattr__(self, "options", tuple(options))
        _require_options("Choice", self.options)
        for option in self.options:
            if not isinstance(option, int | float | str | bool):
                raise ConfigError(f"Choice option {option!r} must be a number, a text or a flag")


@dataclass(frozen=True)
class Uniform:
    """A number between `low` and `high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_range("Uniform", self.low, self.high)


@dataclass(frozen=True)
class LogUniform:
    """A positive number between `low` and `high`, its logarithm uniform."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_range("LogUniform", self.low, self.high)
        if self.low <= 0:
            raise ConfigError(f"LogUniform low {self.low} must be positive: it is spread over the logarithm")


Dimension: TypeAlias = Grid | Choice | Uniform | LogUniform
Space: TypeAlias = Mapping[str, Dimension]


def is_finite(space: Space) -> bool:
    """Whether the space can be enumerated."""
    return all(isinstance(d, Grid | Choice) for d in space.values())


def enumerate_space(space: Space) -> list[dict[str, Value]]:
    """Every point of a finite space, the last key moving fastest. An empty space has one point."""
    assert is_finite(space), "only grids and choices can be enumerated"
    options = [d.values if isinstance(d, Grid) else d.options for d in space.values() if isinstance(d, Grid | Choice)]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*options)]


def format_values(values: Mapping[str, Any]) -> str:
    """`lr_multiplier=0.5, batch_tokens=2048`: for tables, names and log lines."""
    return ", ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def _require_options(kind: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise ConfigError(f"{kind} has no values; give at least one")
    if len(set(values)) != len(values):
        twice = next(v for v in values if values.count(v) > 1)
        raise ConfigError(f"{kind} holds {twice!r} twice; give each value once")


def _require_range(kind: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{kind}({low}, {high}): both ends must be finite and low below high")
