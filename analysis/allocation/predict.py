"""Loss at a target: value, calibrated interval, the surface's value beside it, how far it reaches, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from analysis.allocation.calibrate import MIN_BUDGETS, Calibration, calibrate, stretch_factor
from analysis.allocation.loss_model import LossModel, fit_loss_model, make_runs
from analysis.allocation.parametric import FlopsRule
from analysis.allocation.tools import jsonable
from analysis.errors import DataError
from analysis.noise import SeedNoise
from analysis.words import plural

WARN_EXTRAPOLATION, REFUSE_EXTRAPOLATION = 10.0, 100.0  # of the largest compute fitted
WARN_FORM_SPREAD = 0.01  # surface against frontier: a difference below 1% is no doubt worth naming
WARN_SCALE = 2.0  # errors on held-out budgets twice what the fits expected
WARN_HALF_WIDTH = 0.05  # an interval of +-5% of the loss decides nothing
WARN_EMBEDDING_SHARE = 0.5
RATIO_MARGIN = 2.0  # a D/N this far beyond any run's rests on the surface's form alone
DIGITS = 7
Verdict = Literal["ok", "warn", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`interval`: of the expected loss (the mean over seeds); `run_interval`: of one run, seed noise included. None below four
    budgets. `surface_value`: what the parametric surface alone says; its distance from `value` is the spread of the model's form.
    """

    C: float
    N: float | None
    D: float | None
    value: float
    surface_value: float | None
    interval: tuple[float, float] | None
    run_interval: tuple[float, float] | None
    level: float
    extrapolation: float  # target compute over the largest fitted
    verdict: Verdict
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        run_low, run_high = self.run_interval or (None, None)
        ratio = self.D / self.N if self.N and self.D else None
        keys = ("C", "N", "D", "value", "surface_value", "interval", "run_interval", "level", "extrapolation", "verdict", "reasons")
        return jsonable(
            {
                **{k: getattr(self, k) for k in keys}, "ratio": ratio, "low": low, "high": high, "run_low": run_low,
                "run_high": run_high, "frontier": self.value, "surface": self.surface_value, "distance": self.extrapolation,
            }
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A fitted model with its calibration. Stored in laws.json by `as_dict`, read back by `from_dict`."""

    model: LossModel
    scale: float
    df: float
    folds: int
    embedding_share: float | None = None  # of the largest models fitted

    def stretch(self, level: float) -> float | None:
        """Half width of an interval in standard deviations; None where nothing calibrates one."""
        if not self.folds or self.model.num_budgets < MIN_BUDGETS:
            return None
        return stretch_factor(self.scale, self.df, level)

    def at(
        self, *, target_C: float | None = None, target_N: float | None = None, target_D: float | None = None, level: float = 0.9
    ) -> Prediction:
        """Prediction at C FLOPs (split optimally) or at a model and horizon (N, D), with C where the caller knows it better.

        Needs C, or N and D; DataError otherwise, or where no surface and no frontier could be fitted.
        """
        N, D, C = _target(self.model.rule, target_N, target_D, target_C)
        m = self.model
        if not m.has_frontier and not m.has_surface:
            raise DataError("no loss can be predicted: neither the surface nor the frontier could be fitted; add runs and budgets")
        surface = None
        if m.has_surface:
            best_n, best_d, best_l = m.surface_best(C)
            surface = m.surface_loss(N, D) if N and D else best_l
        reasons = _Reasons()
        if m.has_frontier:
            off_optimum = m.has_surface and N is not None
            log_value, sd = m.log_loss(C, N, D) if off_optimum else m.log_loss(C)
        else:
            assert surface is not None
            log_value, sd = math.log(surface), math.nan
        stretch = self.stretch(level)
        interval = _band(log_value, sd, stretch)
        run_interval = _band(log_value, math.hypot(sd, m.noise_sd), stretch)
        self._judge(reasons, C, N, D, surface, interval, math.exp(log_value))
        if N is None and m.has_surface and math.isfinite(best_n):
            N, D = best_n, best_d
        return Prediction(
            C=C, N=N, D=D, value=math.exp(log_value), surface_value=surface, interval=interval, run_interval=run_interval,
            level=level, extrapolation=C / m.C_range[1], verdict=reasons.verdict, reasons=tuple(reasons.texts),
        )  # fmt: skip

    def _judge(
        self,
        reasons: _Reasons,
        C: float,
        N: float | None,
        D: float | None,
        surface: float | None,
        interval: tuple[float, float] | None,
        value: float,
    ) -> None:
        m = self.model
        distance = C / m.C_range[1]
        if distance > REFUSE_EXTRAPOLATION:
            reasons.add(
                "refuse", f"{distance:,.0f}x beyond the largest compute fitted ({m.C_range[1]:.3g} FLOPs): the limit is 100x"
            )
        elif distance > WARN_EXTRAPOLATION:
            reasons.add("warn", f"{distance:,.0f}x beyond the largest compute fitted ({m.C_range[1]:.3g} FLOPs)")
        below = m.C_range[0] / C
        if below > WARN_EXTRAPOLATION:
            reasons.add("warn", f"{below:.0f}x below the smallest compute fitted ({m.C_range[0]:.3g} FLOPs)")
        if not m.has_frontier:
            reasons.add(
                "refuse",
                f"no frontier: {plural(m.num_budgets, 'budget')} with a minimum, three are needed; this is the surface alone",
            )
        elif m.num_budgets < MIN_BUDGETS:
            reasons.add("warn", f"no interval: {plural(m.num_budgets, 'budget')} with a minimum, four are needed to calibrate one")
        elif interval is None:
            reasons.add("warn", "no interval: no budget could be predicted from those below it")
        if m.has_frontier and m.frontier_status == "at_bound":
            reasons.add("warn", "the frontier is at a bound: the budgets do not show where the loss levels off")
        if m.surface_status in ("not_identifiable", "at_bound", "too_few"):
            reasons.add("warn", f"the parametric surface is {m.surface_status.replace('_', ' ')}")
        if self.folds and self.scale > WARN_SCALE:
            reasons.add("warn", f"budgets held out in turn were missed by {self.scale:.1f} times the error expected of them")
        if interval is not None:
            half = math.log(interval[1] / interval[0]) / 2
            if half > WARN_HALF_WIDTH:
                reasons.add("warn", f"the interval is as wide as ±{100 * half:.0f}% of the loss")
            apart = surface is not None and abs(surface / value - 1) > WARN_FORM_SPREAD
            if surface is not None and apart and not interval[0] <= surface <= interval[1]:
                reasons.add(
                    "warn",
                    f"the surface alone says {surface:.4g}, outside the interval ({surface / value - 1:+.1%})",
                )
        if N and D:
            low, high = m.ratio_range
            if not low / RATIO_MARGIN <= D / N <= high * RATIO_MARGIN:
                reasons.add("warn", f"D/N = {D / N:.3g} lies far outside the {low:.3g}-{high:.3g} of the runs fitted")
        if self.embedding_share is not None and self.embedding_share > WARN_EMBEDDING_SHARE:
            reasons.add(
                "warn",
                f"embeddings are {self.embedding_share:.0%} of the largest models' parameters: N is hardly the network's size",
            )

    def as_dict(self) -> dict[str, Any]:
        m = self.model
        plain = {k: getattr(m, k) for k in m.__dataclass_fields__ if k != "rule"}
        rounded = {k: _rounded(v) if isinstance(v, np.ndarray) and v.ndim == 2 else v for k, v in plain.items()}
        return jsonable(
            {
                **rounded, "rule": m.rule, "scale": self.scale, "df": self.df, "folds": self.folds,
                "embedding_share": self.embedding_share,
            }
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Predictor:
        """DataError where a key is missing."""
        try:
            rule = FlopsRule(coefficient=data["rule"]["k"], exponent=data["rule"]["u"])
            arrays = {
                k: _array(data[k], width)
                for k, width in (("surface", 0), ("frontier", 0), ("surface_draws", 5), ("frontier_draws", 3))
            }
            model = LossModel(
                **arrays, surface_status=data["surface_status"], C0=_number(data["C0"]), frontier_status=data["frontier_status"],
                rule=rule, noise_sd=_number(data["noise_sd"]), num_budgets=int(data["num_budgets"]),
                C_range=tuple(data["C_range"]), ratio_range=tuple(data["ratio_range"]), tilt_sd=float(data.get("tilt_sd", 0.0)),
            )  # fmt: skip
            return cls(
                model=model, scale=float(data["scale"]), df=float(data["df"]), folds=int(data["folds"]),
                embedding_share=data.get("embedding_share"),
            )  # fmt: skip
        except KeyError as e:
            raise DataError(f"the stored predictor has no {e.args[0]!r}: fit the laws again with this version") from e


class _Reasons:
    """Collects reasons; the worst decides the verdict."""

    def __init__(self) -> None:
        self.verdict: Verdict = "ok"
        self.texts: list[str] = []

    def add(self, verdict: Literal["warn", "refuse"], text: str) -> None:
        self.texts.append(text)
        if verdict == "refuse" or self.verdict == "ok":
            self.verdict = verdict


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _array(values: Any, width: int) -> np.ndarray:
    array = np.array([[_number(x) for x in row] for row in values] if width else [_number(x) for x in values], dtype=float)
    return array.reshape(-1, width) if width else array


def _rounded(draws: np.ndarray) -> np.ndarray:
    """Draws to seven digits: they carry a sampling error of 5%, and the file stays readable."""
    with np.errstate(divide="ignore", invalid="ignore"):
        digits = DIGITS - 1 - np.floor(np.log10(np.abs(draws)))
    scale = 10.0 ** np.where(np.isfinite(digits), np.clip(digits, -300, 300), 0)
    return np.asarray(np.round(draws * scale) / scale)


def _band(value: float, sd: float, stretch: float | None) -> tuple[float, float] | None:
    if stretch is None or not math.isfinite(sd):
        return None
    return math.exp(value - stretch * sd), math.exp(value + stretch * sd)


def _target(rule: FlopsRule, N: float | None, D: float | None, C: float | None) -> tuple[float | None, float | None, float]:
    for name, value in (("target_N", N), ("target_D", D), ("target_C", C)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise DataError(f"{name} {value}: give a positive finite number")
    if (N is None) != (D is None):
        if C is None:
            raise DataError("a target needs target_C, or target_N and target_D together")
        if N is None:
            assert D is not None
            N = float((C / (rule.coefficient * D)) ** (1 / rule.exponent))
        else:
            D = float(rule.tokens(N, C))
    if C is None:
        if N is None or D is None:
            raise DataError("a target needs target_C, or target_N and target_D together")
        C = float(rule.flops(N, D))
    return N, D, C


def make_predictor(model: LossModel, calibration: Calibration, embedding_share: float | None = None) -> Predictor:
    return Predictor(
        model=replace(model, tilt_sd=calibration.tilt_sd),
        scale=calibration.scale,
        df=calibration.df,
        folds=len(calibration.mean_squares),
        embedding_share=embedding_share,
    )


def predict_loss(
    N: Any,
    D: Any,
    L: Any,
    budget: Any,
    *,
    C: Any = None,
    target_C: float | None = None,
    target_N: float | None = None,
    target_D: float | None = None,
    level: float = 0.9,
    noise: SeedNoise | None = None,
    seed: int = 0,
) -> Prediction:
    """Fit runs N, D, L (n,) in isoFLOP groups `budget` (n,), calibrate on their own budgets, and predict at the target.

    C (n,): the runs' FLOPs where they differ from the budget. noise: seed noise from replicates.
    """
    runs = make_runs(N, D, L, budget=budget, C=C)
    model = fit_loss_model(runs, noise=noise, seed=seed, thorough=True).model
    return make_predictor(model, calibrate(runs, noise=noise, seed=seed)).at(
        target_C=target_C, target_N=target_N, target_D=target_D, level=level
    )


def predict_from_block(
    block: Mapping[str, Any],
    *,
    target_C: float | None = None,
    target_N: float | None = None,
    target_D: float | None = None,
    level: float = 0.9,
) -> Prediction:
    """The same from the "allocation" block of laws.json alone. DataError where the block holds no predictor."""
    if not block.get("predictor"):
        raise DataError("these laws hold no loss prediction: there were too few runs; fit again with more budgets")
    return Predictor.from_dict(block["predictor"]).at(target_C=target_C, target_N=target_N, target_D=target_D, level=level)


def compute_for_loss(block: Mapping[str, Any], target_loss: float) -> float | None:
    """FLOPs at which the frontier of the "allocation" block reaches `target_loss`; None where it never does or is unknown."""
    if not block.get("predictor"):
        return None
    model = Predictor.from_dict(block["predictor"]).model
    if not model.has_frontier:
        return None
    e, kappa, gamma = model.frontier
    if not (math.isfinite(target_loss) and target_loss > e) or kappa <= 0:
        return None
    return float(model.C0 * ((target_loss - e) / kappa) ** (-1 / gamma))
