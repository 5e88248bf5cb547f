"""Weight decay: which quantity does λ* follow? Candidates, and whether the runs can tell them apart.

Candidates: λ* = k·width^e; λ* = k·D^e; λ* = k·N^e; and the AdamW timescale τ = B/(η·λ·D) (in units of the run) = k·(D/N)^ρ,
published ρ = −0.527 (arXiv 2505.13738). In a ladder of fixed tokens per parameter width, N and D move together: nothing in
such runs separates the candidates, however well each fits (correlation 0.9994 in nanochat's table).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.allocation.tools import jsonable
from analysis.law import Law, Prediction, Status
from analysis.noise import SeedNoise
from analysis.optima import as_points, find_optima
from analysis.power_law import COLLINEAR, MIN_RANGE, SAME_VALUE, Points, fit_line, fit_power_law, log_range
from analysis.words import plural

ASSUMED = {"width": -1.97, "D": -1.0, "N": -1.0, "ratio": 0.527}  # nanochat's width law; constant timescale; −ρ
METHOD = "quadratics of log loss in log weight decay, then one weighted power law a candidate"
REFUTED = 2.0  # a candidate whose leave-one-scale-out error exceeds the best one's by this factor is out
SPREAD = 3.0  # factor by which the separating runs move tokens or batch


@dataclass(frozen=True, kw_only=True)
class WeightDecayLaw:
    """Candidates, their average (geometric mean of predictions, itself a power law), and the verdict.

    `leave_one_scale_out`: rms error of log λ* per candidate, each scale predicted from the others. `separating_runs`: what to
    run so that the candidates disagree, with what each of them predicts there.
    """

    candidates: tuple[Law, ...]
    average: Law | None
    verdict: str
    status: Status
    message: str = ""
    selected: str | None = None
    correlations: dict[str, float]
    leave_one_scale_out: dict[str, float]
    separating_runs: tuple[dict[str, Any], ...] = ()
    cells: tuple[dict[str, Any], ...] = ()
    n: int = 0
    source_hash: str = ""

    def predict(self, *, level: float | None = None, **symbols: float) -> Prediction:
        """The average's value; the interval spans those of all candidates in the average (model-form spread included)."""
        assert self.average is not None, "no candidate could be fitted"
        middle = self.average.predict(level=level, **symbols)
        parts = [c.predict(level=level, **symbols) for c in self.candidates if c.name in self.average.tests["of"]]
        lows, highs = [p.low for p in parts if p.low is not None], [p.high for p in parts if p.high is not None]
        whole = len(lows) == len(parts)
        return replace(middle, low=min(lows) if whole else None, high=max(highs) if whole else None)

    def as_dict(self) -> dict[str, Any]:
        plain = {
            "verdict": self.verdict, "status": self.status, "message": self.message, "selected": self.selected,
            "correlations": self.correlations, "leave_one_scale_out": self.leave_one_scale_out,
            "separating_runs": self.separating_runs, "cells": self.cells, "n": self.n, "source_hash": self.source_hash,
        }  # fmt: skip
        average = None if self.average is None else self.average.as_dict()
        return {"candidates": [c.as_dict() for c in self.candidates], "average": average, **jsonable(plain)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightDecayLaw:
        values = dict(data)
        values["candidates"] = tuple(Law.from_dict(c) for c in values["candidates"])
        values["average"] = None if values["average"] is None else Law.from_dict(values["average"])
        values["separating_runs"], values["cells"] = tuple(values["separating_runs"]), tuple(values["cells"])
        return cls(**values)


def fit_weight_decay(
    frame: pd.DataFrame, *, noise: SeedNoise | None = None, level: float = 0.9, source_hash: str = ""
) -> WeightDecayLaw:
    """The candidates from runs that vary weight decay at fixed (N, D, B, lr). A decay of 0 has no logarithm and is not used."""
    cells = find_optima(frame, "weight_decay", hold=("B", "lr"), noise=noise)
    points = as_points(cells, ("width", "D", "N", "B", "lr"))
    return _fit(points, [c.as_dict(level) for c in cells], level, source_hash)


def weight_decay_from_optima(optima: pd.DataFrame, *, level: float = 0.9, source_hash: str = "") -> WeightDecayLaw:
    """The candidates from a table of optima: columns weight_decay and any of width, D, N, B, lr (and log_se)."""
    n = len(optima)
    nan = np.full(n, np.nan)
    symbols = {s: np.log(optima[s].to_numpy(dtype=float)) if s in optima else nan for s in ("width", "D", "N", "B", "lr")}
    value = np.log(optima["weight_decay"].to_numpy(dtype=float))
    se = optima["log_se"].to_numpy(dtype=float) if "log_se" in optima else nan
    points = Points(symbols=symbols, value=value, se=se, low=nan, high=nan, interior=np.ones(n, dtype=bool))
    cells = [
        {**{s: row[s] for s in symbols if s in optima}, "value": row["weight_decay"], "edge": "interior"}
        for _, row in optima.iterrows()
    ]
    return _fit(points, cells, level, source_hash)


def _nothing_inside(cells: int) -> str:
    return f"no optimum inside the grid in {plural(cells, 'cell')}" if cells else "no cell varies the weight decay"


def _fit(points: Points, cells: Sequence[dict[str, Any]], level: float, source_hash: str) -> WeightDecayLaw:
    predictors = _predictors(points)
    common: dict[str, Any] = {"target": "weight_decay", "method": METHOD, "source_hash": source_hash, "level": level}
    laws = []
    for name, (shifted, symbol) in predictors.items():
        law = fit_power_law(shifted, name=name, symbols=(symbol,), assumed=ASSUMED, **common)
        laws.append(_timescale_law(law, points) if name == "timescale" else replace(law, form=f"weight_decay = k · {symbol}^e"))
    usable = [law for law in laws if law.usable]
    n = int(points.interior.sum())
    whole: dict[str, Any] = {"candidates": tuple(laws), "cells": tuple(cells), "n": n, "source_hash": source_hash}
    if not usable:
        message = laws[0].message if laws else _nothing_inside(len(cells))
        status: Status = laws[0].status if laws else "too_few"
        return WeightDecayLaw(
            average=None,
            verdict=f"no law: {message}",
            status=status,
            message=message,
            correlations={},
            leave_one_scale_out={},
            **whole,
        )
    varying = {name for name, (p, s) in predictors.items() if np.ptp(p.symbols[s][p.interior]) > MIN_RANGE}
    fitted = [law for law in usable if law.name in varying] or usable
    correlations = _correlations(points, predictors, [law.name for law in fitted])
    errors = {law.name: _leave_one_out(*predictors[law.name]) for law in fitted}
    pool, status, verdict = _verdict(fitted, correlations, errors, n)
    selected = pool[0].name if len(pool) == 1 else None
    average = _average(pool, points, level, source_hash)
    runs = _separating_runs(pool, points) if status == "not_identifiable" else ()
    return WeightDecayLaw(
        average=average, verdict=verdict, status=status, message=verdict, selected=selected, correlations=correlations,
        leave_one_scale_out={k: v for k, v in errors.items() if math.isfinite(v)}, separating_runs=runs, **whole,
    )  # fmt: skip


def _predictors(points: Points) -> dict[str, tuple[Points, str]]:
    """Candidates that the cells know, each with its points and symbol. N is left out where D/N is constant: it is D then."""
    inside = points.interior | points.bounded
    known = {s: bool(inside.any() and np.isfinite(points.symbols[s][inside]).all()) for s in points.symbols}
    ratio = points.symbols["D"] - points.symbols["N"]
    varies = {s: known[s] and np.ptp(points.symbols[s][inside]) > SAME_VALUE for s in ("width", "D", "N")}
    fixed_ratio = known["D"] and known["N"] and np.ptp(ratio[inside]) <= SAME_VALUE
    out = {s: (points, s) for s in ("width", "D") if known[s] and (varies[s] or not any(varies.values()))}
    if known["N"] and varies["N"] and not (fixed_ratio and "D" in out):
        out["N"] = (points, "N")
    if all(known[s] for s in ("N", "D", "B", "lr")):
        base = points.symbols["B"] - points.symbols["lr"] - points.symbols["D"]  # log of λ·τ
        shifted = replace(
            points,
            symbols={**points.symbols, "ratio": ratio},
            value=points.value - base,
            low=points.low - base,
            high=points.high - base,
        )
        out["timescale"] = (shifted, "ratio")
    return out


def _timescale_law(law: Law, points: Points) -> Law:
    """1/τ = k·(D/N)^−ρ, refitted as λ = B/(η·D)·k·(D/N)^−ρ, in the symbols a recipe knows."""
    form = "weight_decay = B/(lr · D · tau), tau = k · (D/N)^rho"
    if not law.usable:
        return replace(law, form=form)
    assert law.coefficient is not None
    e, x0 = law.exponents["ratio"], law.references["ratio"]
    inside = points.interior
    refs = {s: float(np.exp(points.symbols[s][inside].mean())) for s in ("N", "D", "B", "lr")}
    log_coefficient = math.log(law.coefficient) + math.log(refs["B"] / refs["lr"] / refs["D"])
    assert abs(math.log(refs["D"] / refs["N"] / x0)) < 1e-9  # both are geometric means over the same cells
    covariance, free = law.covariance, law.free
    if covariance is not None and law.free:
        jacobian = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        covariance = tuple(map(tuple, jacobian @ np.array(covariance) @ jacobian.T))
        free = ("D", "N")
    k = law.parameters["k"]
    intervals = {"rho": None if law.intervals["ratio"] is None else (-law.intervals["ratio"][1], -law.intervals["ratio"][0])}
    held = law.intervals["k"]
    return replace(
        law, form=form, coefficient=math.exp(log_coefficient), exponents={"B": 1.0, "lr": -1.0, "D": e - 1.0, "N": -e},
        references=refs, free=free, covariance=covariance, parameters={"k": 1 / k, "rho": -e},
        standard_errors={"k": None, "rho": law.standard_errors["ratio"]},
        intervals={"k": None if held is None else (1 / held[1], 1 / held[0]), **intervals},
        domain={s: log_range(points.symbols[s][inside]) for s in ("N", "D")},
    )  # fmt: skip


def _correlations(points: Points, predictors: Mapping[str, tuple[Points, str]], names: Sequence[str]) -> dict[str, float]:
    """Correlation of the candidates' predictors over the interior cells; for the timescale that of its own λ prediction."""
    inside = points.interior
    out = {}
    for a, b in combinations(names, 2):
        x, y = (predictors[c][0].symbols[predictors[c][1]][inside] for c in (a, b))
        if len(x) > 2 and np.ptp(x) > SAME_VALUE and np.ptp(y) > SAME_VALUE:
            out[f"{a},{b}"] = float(np.corrcoef(x, y)[0, 1])
    return out


def _leave_one_out(points: Points, symbol: str) -> float:
    """rms error of log λ*, each scale (distinct size) predicted from the others; NaN with fewer than three scales."""
    inside = points.interior
    x, y, se = points.symbols[symbol][inside], points.value[inside], points.se[inside]
    scale = np.round(points.symbols["N"][inside] if np.isfinite(points.symbols["N"][inside]).all() else x, 2)
    if len(np.unique(scale)) < 3:
        return float("nan")
    errors = []
    for s in np.unique(scale):
        rest = scale != s
        held = ASSUMED[symbol] if np.ptp(x[rest]) <= SAME_VALUE else None
        columns = [np.ones(int(rest.sum()))] + ([] if held is not None else [x[rest]])
        line = fit_line(np.column_stack(columns), y[rest] - (held or 0.0) * x[rest], se[rest])
        slope = held if held is not None else float(line.beta[1])
        errors += list(y[~rest] - line.beta[0] - slope * x[~rest])
    return float(np.sqrt(np.mean(np.square(errors))))


def _verdict(
    fitted: Sequence[Law], correlations: Mapping[str, float], errors: Mapping[str, float], n: int
) -> tuple[list[Law], Status, str]:
    """Candidates left standing, the status of the whole, and why in words.

    A candidate stays when its leave-one-scale-out error is within twice the best one's, or when its predictor moves together
    with the best one's (then a better error is luck). One left: selected. Several: not identifiable.
    """
    if n < 3 or all(law.status == "too_few" for law in fitted):
        words = "two scales fix an exponent exactly and leave nothing to judge it by" if n == 2 else fitted[0].message
        return list(fitted), "too_few", f"too few scales ({n}): {words}; published exponents with fitted constants"
    if len(fitted) == 1:
        return list(fitted), fitted[0].status, f"one candidate only ({fitted[0].name}): nothing to compare it with"
    ranked = sorted((v, k) for k, v in errors.items() if math.isfinite(v))
    best = ranked[0][1] if ranked else fitted[0].name
    together = {k for pair, r in correlations.items() if abs(r) > COLLINEAR and best in pair.split(",") for k in pair.split(",")}
    near = {k for v, k in ranked if v <= REFUTED * ranked[0][0]} if ranked else {law.name for law in fitted}
    pool = [law for law in fitted if law.name in near | together]
    if len(pool) == 1:
        next_best = f", {ranked[1][0]:.3f} for {ranked[1][1]}" if len(ranked) > 1 else ""
        words = f"{best} predicts left-out scales best: rms error of log decay {ranked[0][0]:.3f}{next_best}"
        return pool, pool[0].status, words
    if together:
        pair, r = max(((p, r) for p, r in correlations.items() if best in p.split(",")), key=lambda item: abs(item[1]))
        why = f"{' and '.join(pair.split(','))} move together in these runs (correlation {r:.4f})"
    else:
        why = "no candidate predicts left-out scales clearly better"
    return pool, "not_identifiable", f"not identifiable: {why}; the average of {', '.join(law.name for law in pool)} is given"


def _average(laws: Sequence[Law], points: Points, level: float, source_hash: str) -> Law:
    """Geometric mean of the candidates' predictions: exponents are averaged, the coefficient is taken at the cells' middle."""
    symbols = sorted({s for law in laws for s in law.exponents})
    inside = points.interior
    references = {s: float(np.exp(points.symbols[s][inside].mean())) for s in symbols}
    exponents = {s: sum(law.exponents.get(s, 0.0) for law in laws) / len(laws) for s in symbols}
    coefficient = math.exp(sum(law.log_value(**references) for law in laws) / len(laws))
    names = [law.name for law in laws]
    single = laws[0] if len(laws) == 1 else None
    return Law(
        name="weight_decay", target="weight_decay", form=single.form if single else "geometric mean of " + ", ".join(names),
        coefficient=coefficient, exponents=exponents, references=references, free=single.free if single else (),
        parameters=dict(exponents), level=level, n=laws[0].n,
        covariance=single.covariance if single else None, residual_sd=single.residual_sd if single else None,
        df=single.df if single else 0.0,
        domain={k: v for law in laws for k, v in law.domain.items()}, method=METHOD, status=laws[0].status,
        message="interval spans all candidates", source_hash=source_hash, tests={"of": names},
    )  # fmt: skip


def _separating_runs(laws: Sequence[Law], points: Points) -> tuple[dict[str, Any], ...]:
    """Two sweeps on which the candidates disagree: other horizons at a fixed size, other batches at a fixed (N, D)."""
    inside = np.flatnonzero(points.interior)
    sizes = points.symbols["N"] if np.isfinite(points.symbols["N"][inside]).all() else points.symbols["width"]
    middle = inside[np.argsort(sizes[inside])[len(inside) // 2]]
    at = {s: float(np.exp(v[middle])) for s, v in points.symbols.items() if np.isfinite(v[middle])}
    runs = []
    for what, symbol in (("vary tokens per parameter at a fixed width", "D"), ("vary the batch at a fixed (N, D)", "B")):
        if symbol not in at:
            continue
        values = [at[symbol] / SPREAD, at[symbol] * SPREAD]
        told = {law.name: [law.predict(**{**at, symbol: v}).value for v in values] for law in laws if set(law.exponents) <= set(at)}
        if len({tuple(round(v, 12) for v in t) for t in told.values()}) > 1:
            runs.append({"what": what, "at": {k: v for k, v in at.items() if k != symbol}, symbol: values, "predictions": told})
    return tuple(runs)
