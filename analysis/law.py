"""Law: a fitted power law with everything needed to bet on it or to refuse to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from scipy import stats

from analysis.allocation.tools import jsonable
from analysis.errors import DataError

Status = Literal["converged", "at_bound", "not_identifiable", "too_few"]
STATUSES: tuple[Status, ...] = ("converged", "at_bound", "not_identifiable", "too_few")
SYMBOLS = ("N", "D", "B", "width", "lr", "ratio")  # widths in channels, N and D counts, B tokens, ratio D/N


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Value and interval (null where none is known), and how far outside the fitted domain it lies (a factor, 1 inside)."""

    value: float
    low: float | None
    high: float | None
    level: float
    extrapolation: float
    symbol: str = ""  # the one that is farthest outside


@dataclass(frozen=True, kw_only=True)
class Law:
    """target = coefficient · Π (x / reference_x)^exponent_x.

    `free`: the exponents that were fitted, the others were assumed. `covariance` of (log coefficient, *free) without the
    scatter of single optima about the law, which is `residual_sd` (of the logarithm); `df` degrees of freedom of both.
    `parameters` holds k, the coefficient with all references 1, and the exponents; `intervals` theirs at `level` (null: none).
    `domain`: range of each symbol among the cells that were fitted. `cells`: every cell's own optimum with its edge mark.
    """

    name: str
    target: str
    form: str
    coefficient: float | None
    exponents: dict[str, float] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    parameters: dict[str, float] = field(default_factory=dict)
    standard_errors: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    level: float = 0.9
    covariance: tuple[tuple[float, ...], ...] | None = None
    residual_sd: float | None = None
    df: float = 0.0
    domain: dict[str, tuple[float, float]] = field(default_factory=dict)
    method: str = ""
    n: int = 0
    status: Status = "too_few"
    message: str = ""
    source_hash: str = ""
    tests: dict[str, Any] = field(default_factory=dict)
    cells: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert set(self.exponents) <= set(SYMBOLS), self.exponents

    @property
    def usable(self) -> bool:
        """Whether there is a value to predict at all, whatever the status says about trusting it."""
        return self.coefficient is not None

    def log_value(self, **symbols: float) -> float:
        """Natural logarithm of the law at the given symbols. DataError when one is missing or not positive."""
        if self.coefficient is None:
            raise DataError(f"law {self.name} has no value ({self.message}); it cannot predict")
        total = math.log(self.coefficient)
        for symbol, exponent in self.exponents.items():
            value = symbols.get(symbol)
            if value is None or not value > 0:
                raise DataError(f"law {self.name} needs {symbol} > 0 to predict {self.target}, got {value}")
            total += exponent * math.log(value / self.references.get(symbol, 1.0))
        return total

    def predict(self, *, level: float | None = None, **symbols: float) -> Prediction:
        """The optimum to expect at N, D, B, width, lr (those in `exponents`), with the interval for one new optimum:
        t quantile × √(x'Vx + scatter²) of the logarithm; null when the law has no covariance."""
        level = self.level if level is None else level
        log_value = self.log_value(**symbols)
        low = high = None
        if self.covariance is not None and self.df > 0:
            x = np.array([1.0, *(math.log(symbols[s] / self.references.get(s, 1.0)) for s in self.free)])
            variance = float(x @ np.array(self.covariance) @ x) + (self.residual_sd or 0.0) ** 2
            half = float(stats.t.ppf((1 + level) / 2, self.df)) * math.sqrt(variance)
            low, high = (math.exp(min(700.0, max(-700.0, log_value + sign * half))) for sign in (-1, 1))
        distance, farthest = 1.0, ""
        for symbol, (lo, hi) in self.domain.items():
            value = symbols.get(symbol)
            if value:
                factor = max(lo / value, value / hi, 1.0)
                if factor > distance:
                    distance, farthest = factor, symbol
        return Prediction(value=math.exp(log_value), low=low, high=high, level=level, extrapolation=distance, symbol=farthest)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data; NaN and infinity become null."""
        return jsonable({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Law:
        values = dict(data)
        values["free"] = tuple(values.get("free") or ())
        if values.get("covariance") is not None:
            values["covariance"] = tuple(tuple(float(v) for v in row) for row in values["covariance"])
        values["intervals"] = {k: None if v is None else (v[0], v[1]) for k, v in (values.get("intervals") or {}).items()}
        values["domain"] = {k: (v[0], v[1]) for k, v in (values.get("domain") or {}).items()}
        values["cells"] = tuple(values.get("cells") or ())
        return cls(**values)


def unit_coefficient(coefficient: float, exponents: Mapping[str, float], references: Mapping[str, float]) -> float:
    """The coefficient k of the same law with all references 1."""
    return math.exp(math.log(coefficient) - sum(e * math.log(references.get(s, 1.0)) for s, e in exponents.items()))
