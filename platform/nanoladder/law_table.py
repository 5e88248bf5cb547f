"""Fitted laws as rows for people: what, value, interval, status."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoladder.laws_to_recipe import law_text

Row = tuple[str, str, str, str]


def law_rows(path: str | Path) -> list[Row]:
    """Rows of a laws.json. Raises DataError for a broken one."""
    from analysis.laws import Laws

    return rows_of(Laws.load(path).as_dict())


def rows_of(laws: Mapping[str, Any]) -> list[Row]:
    """Allocation's exponents, ratio and frontier, then batch, learning rate and weight decay."""
    allocation = laws.get("allocation") or {}
    rows = [*_surface_rows(allocation), *_isoflop_rows(allocation), *_ratio_rows(allocation), *_frontier_rows(allocation)]
    for name, title in (("batch_size", "batch (tokens)"), ("learning_rate", "matrix learning rate")):
        rows.append(_law_row(title, laws.get(name)))
    decay = laws.get("weight_decay") or {}
    best = {**(decay.get("average") or {}), "status": decay.get("status", "not fitted")}
    return [*rows, _law_row("weight decay", best)]


def _surface_rows(allocation: Mapping[str, Any]) -> list[Row]:
    fit = allocation.get("parametric")
    if not fit:
        return []
    if fit.get("alpha") is None:
        return [("loss L(N, D)", "–", "", fit.get("status", "–"))]
    text = f"{fit['E']:.3f} + {fit['A']:.4g}/N^{fit['alpha']:.3f} + {fit['B']:.4g}/D^{fit['beta']:.3f}"
    intervals = fit.get("intervals") or {}
    spread = ", ".join(f"{k} {_interval(intervals[k])}" for k in ("alpha", "beta") if intervals.get(k))
    return [("loss L(N, D)", text, spread, fit["status"])]


def _isoflop_rows(allocation: Mapping[str, Any]) -> list[Row]:
    rows = []
    for key, title in (("N", "best size N*(C)"), ("D", "best tokens D*(C)")):
        law = (allocation.get("isoflop") or {}).get(key)
        if law and law.get("exponent") is not None:
            rows.append(
                (
                    title,
                    f"{law['coefficient']:.3g} · C^{law['exponent']:.3f}",
                    _interval(law.get("exponent_interval")),
                    law.get("status", ""),
                )
            )
    return rows


def _ratio_rows(allocation: Mapping[str, Any]) -> list[Row]:
    """Compute-optimal tokens per parameter at the target, by the minima and by the surface (whose interval it is)."""
    ratio = allocation.get("ratio") or {}
    if ratio.get("C") is None:
        return []
    ways = [(ratio.get("isoflop"), "isoFLOP"), (ratio.get("ratio"), "surface")]
    text = ", ".join(f"{value:.1f} ({way})" for value, way in ways if value is not None)
    interval = _interval([ratio["ratio_low"], ratio["ratio_high"]]) if ratio.get("ratio_low") is not None else ""
    return [(f"D/N at {ratio['C']:.2g} FLOPs", text or "–", interval, ratio.get("status", ""))]


def _frontier_rows(allocation: Mapping[str, Any]) -> list[Row]:
    fit = allocation.get("frontier")
    if not fit or fit.get("gamma") is None:
        return []
    return [("best loss L*(C)", f"{fit['E']:.3f} + {fit['kappa']:.4g} · C^−{fit['gamma']:.3f}", "", fit.get("status", ""))]


def _law_row(title: str, law: Mapping[str, Any] | None) -> Row:
    if not law or law.get("coefficient") is None:
        return (title, "–", "", (law or {}).get("status", "not fitted"))
    intervals = law.get("intervals") or {}
    spread = ", ".join(f"exponent of {s} {_interval(intervals[s])}" for s in law["exponents"] if intervals.get(s))
    return (title, law_text({k: v for k, v in law.items() if k != "method"}), spread, law.get("status", ""))


def _interval(value: Any) -> str:
    return f"[{value[0]:.3f}, {value[1]:.3f}]" if value and value[0] is not None else ""
