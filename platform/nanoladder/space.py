"""The dimensions of a search space. Plain data: Optuna's distributions are made from them in `study`.

Keys of a space are what `Recipe.resolve` takes as overrides: `batch_tokens`, `lr_multiplier`, `weight_decay_multiplier`,
or any dotted key of a TrainConfig.
"""

from __future__ import annotations

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


Plain: TypeAlias = Grid | Choice | Uniform | LogUniform


@dataclass(frozen=True)
class When:
    """`dimension`, only where the dimension `key`, given before it, has one of `values`; elsewhere the recipe's own value stays.

    {"schedule.kind": Choice(["nanochat", "constant_then_decay"]),
     "schedule.warmdown_fraction": When("schedule.kind", "constant_then_decay", Uniform(0.1, 0.4))}
    """

    key: str
    values: tuple[Value, ...]
    dimension: Plain

    def __init__(self, key: str, values: Value | Iterable[Value], dimension: Plain) -> None:
        many = tuple(values) if isinstance(values, list | tuple) else (values,)
        _require_options("When", many)
        if not isinstance(dimension, Grid | Choice | Uniform | LogUniform):
            raise ConfigError(f"When({key!r}, …) needs a Grid, Choice, Uniform or LogUniform, not {type(dimension).__name__}")
        for name, value in (("key", key), ("values", many), ("dimension", dimension)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Times:
    """In a variant: `factor` times what the recipe gives the cell. So a change keeps its meaning at every depth and horizon."""

    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ConfigError(f"Times({self.factor}) must be a positive factor")

    def __str__(self) -> str:
        return f"×{self.factor:.6g}"


Dimension: TypeAlias = Plain | When
Space: TypeAlias = Mapping[str, Dimension]


def plain(dimension: Dimension) -> Plain:
    """The dimension itself, its condition taken off."""
    return dimension.dimension if isinstance(dimension, When) else dimension


def is_active(dimension: Dimension, values: Mapping[str, Any]) -> bool:
    """Whether a dimension applies where those before it have `values`."""
    return not isinstance(dimension, When) or (dimension.key in values and values[dimension.key] in dimension.values)


def check_space(space: Space, where: str) -> None:
    """ConfigError where a condition refers to what is not before it, or to a value that cannot occur."""
    before: dict[str, Dimension] = {}
    for key, dimension in space.items():
        if not isinstance(dimension, Grid | Choice | Uniform | LogUniform | When):
            raise ConfigError(
                f"{where}: {key} is of type {type(dimension).__name__}, no dimension; write Grid([0.5, 1, 2]), Choice, Uniform, "
                "LogUniform or When"
            )
        if isinstance(dimension, When):
            if dimension.key not in before:
                raise ConfigError(f"{where}: {key} depends on {dimension.key!r}, which must be a dimension before it")
            parent = plain(before[dimension.key])
            options = parent.values if isinstance(parent, Grid) else parent.options if isinstance(parent, Choice) else None
            wrong = [v for v in dimension.values if options is None or v not in options]
            if wrong:
                raise ConfigError(f"{where}: {key} depends on {dimension.key} = {wrong[0]!r}, which that dimension never is")
        before[key] = dimension


def is_finite(space: Space) -> bool:
    """Whether the space can be enumerated."""
    return all(isinstance(plain(d), Grid | Choice) for d in space.values())


def enumerate_space(space: Space) -> list[dict[str, Value]]:
    """Every point of a finite space, the last key moving fastest. An empty space has one point."""
    assert is_finite(space), "only grids and choices can be enumerated"
    points: list[dict[str, Value]] = [{}]
    for key, dimension in space.items():
        of = plain(dimension)
        options = of.values if isinstance(of, Grid) else of.options if isinstance(of, Choice) else ()
        points = (
            [{**p, key: v} for p in points for v in options]
            if not isinstance(dimension, When)
            else [q for p in points for q in ([{**p, key: v} for v in options] if is_active(dimension, p) else [p])]
        )
    return points


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
