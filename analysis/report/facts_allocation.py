"""Facts about the split of compute: isoFLOP minima, the surface, the conventions of N, the frontier, predictions held out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.report import format as fmt
from analysis.report.figures.surface import surface_loss

Block = Mapping[str, Any]
Z90 = 1.6448536269514722  # of the normal: a 90% interval from a standard deviation
NO_ALLOCATION = "No grid of sizes over compute budgets among these runs, so the split of compute is not fitted."
NO_BUDGETS = "These runs share no compute budgets, so there are no isoFLOP curves; the surface uses the runs as they are."
SAME_BUDGET = 0.2  # of log C: runs of one budget differ by the rounding to whole steps
MOST_RUNS = 60  # of one budget in the figure of errors
NO_HELD_OUT = "Fewer than four budgets, so no budget could be hidden and predicted from the lower ones."


def allocation_facts(raw: Block, frame: pd.DataFrame, convention: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """budgets, isoflop, parametric, conventions, frontier, prediction and held_out from the laws' "allocation" block."""
    budgets = sorted(float(b) for b in frame["budget"].dropna().unique())
    minima = [_minimum(b) for b in (raw.get("isoflop") or {}).get("budgets") or []]
    facts: dict[str, Any] = {"budgets": [m["C"] for m in minima] or budgets}
    facts["isoflop"] = _isoflop(raw.get("isoflop") or {}, minima)
    facts["conventions"] = _conventions(raw, convention, labels, minima)
    facts["parametric"] = _parametric(raw, facts["conventions"], convention)
    facts["frontier"] = _frontier(raw.get("frontier") or {})
    chosen = (facts["conventions"].get("by_name") or {}).get(convention) or {}
    facts["prediction"] = _prediction(raw, chosen.get("path") or {})
    facts["held_out"] = _held_out(raw.get("held_out") or [], raw.get("held_out_runs") or [])
    return facts


def _minimum(b: Block) -> dict[str, Any]:
    """One budget's minimum with D/N and its interval (both ends of N and D taken apart: they move against each other)."""
    out = {k: v for k, v in b.items() if k != "rows"} | {"side": b.get("side") or b.get("edge")}
    n, d = b.get("N_opt"), b.get("D_opt")
    out["ratio_opt"] = d / n if fmt.is_number(n) and fmt.is_number(d) and n > 0 else None
    for end, n_end, d_end in (("ratio_low", "N_high", "D_low"), ("ratio_high", "N_low", "D_high")):
        top, bottom = b.get(d_end), b.get(n_end)
        out[end] = top / bottom if fmt.is_number(top) and fmt.is_number(bottom) and bottom > 0 else None
    return out


def _isoflop(raw: Block, minima: Sequence[Block]) -> dict[str, Any]:
    if not minima:
        return {"missing": NO_BUDGETS if raw else NO_ALLOCATION}
    inside = sum(m.get("status") == "interior" for m in minima)
    many = fmt.plural(len(minima), "budget")
    place = f"All {many} have" if inside == len(minima) > 1 else f"{inside} of {many} {'has' if inside == 1 else 'have'}"
    text = f"{place} the minimum clearly inside {'its' if inside == 1 else 'their'} grid"
    exponents = {key: exponent(raw.get(key)) for key in ("N", "D")}
    if exponents["N"] and exponents["D"]:
        text += f"; through the minima N* ∝ {power('C', exponents['N'])} and D* ∝ {power('C', exponents['D'])}"
    notes = [f"{fmt.scientific(m['C'], 2)} FLOPs: {m['message']}" for m in minima if m.get("message")]
    return {
        "budgets": list(minima), "text": text + ".", "exponents": exponents, "status": raw.get("status"), "used": raw.get("used"),
        "residual_sd": raw.get("residual_sd"), "notes": notes,
    }  # fmt: skip


def exponent(law: Block | None) -> dict[str, Any] | None:
    """{"value", "low", "high"} of a law in compute (its exponent and exponent_interval); None where it has none."""
    if not law or not fmt.is_number(law.get("exponent")):
        return None
    low, high = law.get("exponent_interval") or (None, None)
    return {"value": law["exponent"], "low": low, "high": high}


def power(symbol: str, law: Block) -> str:
    """C^0.46 (0.42 to 0.51)."""
    interval = f" ({fmt.interval(law['low'], law['high'], fmt.exponent)})" if fmt.is_number(law.get("low")) else ""
    return f"{symbol}^{fmt.exponent(law['value'])}{interval}"


def _conventions(raw: Block, convention: str, labels: Mapping[str, str], minima: Sequence[Block]) -> dict[str, Any]:
    """Every way of counting N with its path along compute, its minima and exponents; which one is steadiest."""
    given = raw.get("conventions") or {}
    by_name: dict[str, Any] = {}
    for name, block in (given.get("by_name") or {}).items():
        own = list(minima) if name == convention else [_minimum(b) for b in block.get("minima") or []]
        by_name[name] = _convention(block, labels.get(name, name), own)
    if convention not in by_name and raw.get("path"):
        alone = {"path": raw["path"], "N": (raw.get("isoflop") or {}).get("N"), "D": (raw.get("isoflop") or {}).get("D")}
        by_name = {convention: _convention(alone, labels.get(convention, convention), list(minima)), **by_name}
    if not by_name:
        return {"missing": NO_ALLOCATION}
    ordered = {name: by_name[name] for name in sorted(by_name, key=lambda n: n != convention)}
    steadiest = given.get("steadiest")
    out = {"by_name": ordered, "steadiest": steadiest, "message": given.get("message") or ""}
    return {**out, "text": _conventions_text(ordered, convention, steadiest, labels, str(out["message"]))}


def _convention(block: Block, label: str, minima: list[Any]) -> dict[str, Any]:
    path = block.get("path") or {}
    ratios = [r for r in path.get("ratio") or [] if fmt.is_number(r)]
    found = [m["ratio_opt"] for m in minima if fmt.is_number(m.get("ratio_opt"))]
    return {
        "label": label,
        "path": path,
        "minima": minima,
        "N_exponent": exponent(block.get("N")) or path_exponent(path, "N"),
        "D_exponent": exponent(block.get("D")) or path_exponent(path, "D"),
        "ratio_exponent": _drift(block.get("steadiness")) or path_exponent(path, "ratio"),
        "ratio_ends": [found[0], found[-1]] if found else [ratios[0], ratios[-1]] if ratios else None,
        "steadiness": block.get("steadiness"),
    }


def _drift(steadiness: Block | None) -> dict[str, Any] | None:
    """Exponent of D/N in compute through the budgets' minima."""
    if not steadiness or not fmt.is_number(steadiness.get("drift")):
        return None
    low, high = steadiness.get("drift_interval") or (None, None)
    return {"value": steadiness["drift"], "low": low, "high": high}


def path_exponent(path: Block, quantity: str) -> dict[str, Any] | None:
    """Slope of log quantity against log C along a path (a power law, so any two points would do)."""
    pairs = [(c, v) for c, v in zip(path.get("C") or [], path.get(quantity) or [], strict=False) if fmt.is_number(v)]
    if len(pairs) < 2:
        return None
    logs = np.log(np.array(pairs, dtype=float))
    return {"value": float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0]), "low": None, "high": None}


def _conventions_text(
    by_name: Mapping[str, Any], convention: str, steadiest: str | None, labels: Mapping[str, str], said: str
) -> str:
    chosen = by_name.get(convention) or next(iter(by_name.values()))
    drift = chosen["ratio_exponent"]
    text = ""
    if drift:
        change = 10.0 ** drift["value"] - 1
        if abs(change) < 0.02:
            text = f"Counted as {chosen['label']}, tokens per parameter stay the same along compute. "
        else:
            way = "rise" if change > 0 else "fall"
            text = f"Counted as {chosen['label']}, tokens per parameter {way} by {fmt.percent(abs(change))} a decade of compute. "
    if said:
        text += f"{said[:1].upper()}{said[1:].rstrip('.')}."
    elif steadiest is not None and len(by_name) > 1:
        text += f"The steadiest count is {labels.get(steadiest, steadiest)}" + (
            ", the one used here." if steadiest == convention else "."
        )
    return text.strip()


def _parametric(raw: Block, conventions: Block, convention: str) -> dict[str, Any]:
    fit = raw.get("parametric") or {}
    if not fmt.is_number(fit.get("E")) or not fmt.is_number(fit.get("alpha")):
        return {"missing": fit.get("message") or NO_ALLOCATION}
    path = dict(((conventions.get("by_name") or {}).get(convention) or {}).get("path") or {})
    if path.get("N") and path.get("D"):
        path["L"] = [float(v) for v in surface_loss(fit, np.array(path["N"], dtype=float), np.array(path["D"], dtype=float))]
    text = f"The surface meets {fmt.plural(fit['n'], 'run')}"
    if fmt.is_number(fit.get("residual_sd")):
        text += f" within {fmt.percent(fit['residual_sd'])} (robust standard deviation of the residuals)"
    text += f"; {fit['message'].rstrip('.')}." if fit.get("message") else "."
    variants = {"huber_1e-3 (reported)": fit, **(fit.get("variants") or {})}
    outliers = fit.get("without_outliers") or {}
    if outliers.get("fit"):
        gone = (outliers.get("flagged") or 0) + (outliers.get("far") or 0)
        variants[f"without {fmt.plural(gone, 'outlier')}"] = outliers["fit"]
    keys = ("E", "A", "B", "alpha", "beta", "status")
    short = {name: {k: v.get(k) for k in keys} for name, v in variants.items()}
    return {**fit, "path": path or None, "text": text, "variants": short if len(short) > 1 else {}}


def _frontier(raw: Block) -> dict[str, Any]:
    if not fmt.is_number(raw.get("E")):
        return {"missing": raw.get("message") or "No frontier: it needs the lowest loss of at least three budgets."}
    points = [dict(p) for p in raw.get("points") or []]
    for p in points:
        if fmt.is_number(p.get("sd")):
            p["low"], p["high"] = p["L"] * math.exp(-Z90 * p["sd"]), p["L"] * math.exp(Z90 * p["sd"])
    return {**raw, "points": points}


def _prediction(raw: Block, path: Block) -> dict[str, Any]:
    """The target's allocation and its loss in one block. low, high are those of one run (its seed noise included) where they
    are known, else of the expected loss; the ends of N, D and D/N come from the path's band."""
    out = dict(raw.get("prediction") or {})
    if not fmt.is_number(out.get("C")) or not fmt.is_number(out.get("value")):
        return {**out, "text": "Nothing is predicted: these runs carry no frontier."}
    if fmt.is_number(out.get("run_low")) and fmt.is_number(out.get("run_high")):
        out |= {"expected_low": out.get("low"), "expected_high": out.get("high"), "low": out["run_low"], "high": out["run_high"]}
    ratio = raw.get("ratio") or {}
    if _by_minima(raw, out):
        out |= {key: ratio[f"isoflop_{key}"] for key in ("N", "N_low", "N_high", "D", "D_low", "D_high")}
        out |= {"ratio": ratio["isoflop"], "ratio_low": ratio.get("isoflop_low"), "ratio_high": ratio.get("isoflop_high")}
    out["by"] = "minima" if _by_minima(raw, out) else "surface"
    same = fmt.is_number(ratio.get("C")) and abs(ratio["C"] / out["C"] - 1) < 1e-9
    for key in ("N", "D", "ratio"):
        for end in ("low", "high"):
            if out["by"] == "surface" and not fmt.is_number(out.get(f"{key}_{end}")):
                out[f"{key}_{end}"] = ratio.get(f"{key}_{end}") if same else _along(path, f"{key}_{end}", float(out["C"]))
    known = fmt.is_number(out.get("low"))
    interval = f"90% interval {fmt.interval(out['low'], out.get('high'), fmt.loss)}" if known else "no interval can be given"
    what = "frontier" if fmt.is_number((raw.get("frontier") or {}).get("E")) else "surface alone"
    text = f"At {fmt.flops(out['C'])} FLOPs the {what} gives {fmt.loss(out['value'])} ({interval})"
    if what == "frontier" and fmt.is_number(out.get("surface")):
        text += f"; the surface, another form of the same law, gives {fmt.loss(out['surface'])} "
        text += f"({fmt.percent(out['surface'] / out['value'] - 1, 2, True)})"
    return {**out, "text": text + "."}


def _by_minima(raw: Block, prediction: Block) -> bool:
    """Whether N* and D* of the target are better taken from the laws through the isoFLOP minima: the surface did not converge, they
    did, and nobody asked for another model."""
    ratio, iso = raw.get("ratio") or {}, raw.get("isoflop") or {}
    if (raw.get("parametric") or {}).get("status") == "converged" or not fmt.is_number(ratio.get("isoflop_N_low")):
        return False
    good = all((iso.get(key) or {}).get("status") == "converged" for key in ("N", "D"))
    return good and iso.get("status") == "converged" and abs(ratio["C"] / prediction["C"] - 1) < 1e-9


def _along(path: Block, key: str, c: float) -> float | None:
    """A column of a path at C, log-linear between its points; None outside it or where it is unknown."""
    pairs = [(x, v) for x, v in zip(path.get("C") or [], path.get(key) or [], strict=False) if fmt.is_number(v) and v > 0]
    if len(pairs) < 2 or not pairs[0][0] * 0.999 <= c <= pairs[-1][0] * 1.001:
        return None
    logs = np.log(np.array(pairs, dtype=float))
    return float(np.exp(np.interp(math.log(c), logs[:, 0], logs[:, 1])))


def _has_error(row: Block) -> bool:
    return fmt.is_number(row.get("measured")) and fmt.is_number(row.get("predicted"))


def _held_out(minima: Sequence[Block], runs: Sequence[Block]) -> dict[str, Any]:
    """One row a budget that was predicted from those below it: its minimum, and the errors of its single runs beside it."""
    kept: list[dict[str, Any]] = []
    for row in sorted(filter(_has_error, minima), key=lambda r: float(r["C"])):
        c = float(row["C"])
        own = [r for r in runs if _has_error(r) and abs(math.log(float(r["C"]) / c)) < SAME_BUDGET]
        errors = [r["measured"] / r["predicted"] - 1 for r in own[:: max(1, len(own) // MOST_RUNS)]]
        kept.append({**row, "label": f"{fmt.scientific(c, 2)} FLOPs", "run_errors": errors})
    if not kept:
        return {"missing": NO_HELD_OUT}
    errors = [r["measured"] / r["predicted"] - 1 for r in kept]
    worst = fmt.percent(max(errors, key=abs), 2, True)
    inside = [r["low"] <= r["measured"] <= r["high"] for r in kept if fmt.is_number(r.get("low")) and fmt.is_number(r.get("high"))]
    if len(kept) == 1:
        text = f"Fitted to the lower budgets, the laws missed the highest by {worst}"
        text += f", {'inside' if inside[0] else 'outside'} the interval." if inside else "."
    else:
        text = f"Each of {len(kept)} budgets, predicted from the lower ones, was missed by at most {worst}"
        text += f"; {sum(inside)} of {len(inside)} with an interval lie inside it." if inside else "."
    return {"rows": kept, "text": text, "rms": math.sqrt(sum(e * e for e in errors) / len(errors))}
