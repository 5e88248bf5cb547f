"""Facts about the runs themselves: noise, production, promotions, cost, and the list of every run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.purposes import assign_purposes
from analysis.report import format as fmt
from analysis.stage_ranks import stage_ranks
from analysis.table import RunTable

RUN_KEYS = (
    "run_id", "name", "sweep", "stage", "L", "N", "D", "C", "budget", "B", "lr", "weight_decay", "width", "depth", "seed",
    "seconds", "device", "num_devices",
)  # fmt: skip
NO_NOISE = (
    "No runs that differ only in their seed, so the noise of one run is not known; three seeds of one middle cell would tell."
)
NO_PRODUCTION = "No production run yet; `nanoladder launch` starts one and writes its prediction first."
NO_PROMOTIONS = "No stage promotions among these runs: no change was tested at a small depth and again at a larger one."


def noise_facts(raw: Mapping[str, Any] | None, table: RunTable) -> dict[str, Any]:
    """sigma: relative standard deviation of one run's loss; groups of replicates with every loss."""
    if not raw or not fmt.is_number(raw.get("sd")):
        return {"missing": NO_NOISE}
    losses = dict(zip(table.frame["run_id"], table.frame["L"], strict=True))
    groups = []
    for cell in raw.get("cells") or []:
        ids = [r for r in cell.get("run_ids") or [] if r in losses]
        label = f"N {fmt.count(cell.get('N'))}, D {fmt.count(cell.get('D'))}"
        found = [float(losses[r]) for r in ids]
        groups.append({"label": label, "n": cell.get("n"), "sd": cell.get("sd"), "run_ids": ids, "loss": found})
    sigma = float(raw["sd"])
    block = {"sigma": sigma, **{k: raw.get(k) for k in ("low", "high", "df", "status", "message")}, "groups": groups}
    return {**block, "text": _noise_text(sigma, raw, groups)}


def _noise_text(sigma: float, raw: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str:
    runs = sum(g["n"] or 0 for g in groups)
    return (
        f"A run's loss moves by {fmt.percent(sigma)} (90% interval {fmt.interval(raw.get('low'), raw.get('high'), fmt.percent)}) "
        f"when only its seed changes, from {fmt.plural(runs, 'run')} in {fmt.plural(len(groups), 'group')}; two single runs closer "
        f"than {fmt.percent(2 * math.sqrt(2) * sigma)} cannot be told apart."
    )


def production_facts(production: Mapping[str, Any] | None, loss_name: str) -> dict[str, Any]:
    """The production run against its prediction; `error` is (measured - predicted) / predicted."""
    if not production:
        return {"missing": NO_PRODUCTION}
    out: dict[str, Any] = dict(production)
    predicted, measured = out.get("predicted"), out.get("measured")
    if not fmt.is_number(measured):
        return {**out, "text": "The production run has not ended; its prediction is on record."}
    if not fmt.is_number(predicted):
        return {**out, "text": f"The production run ended at {loss_name} {fmt.loss(measured)}; no prediction was on record."}
    out["error"] = measured / predicted - 1
    side = "above" if out["error"] > 0 else "below"
    text = f"The production run ended at {loss_name} {fmt.loss(measured)}, {fmt.percent(abs(out['error']))} {side} its prediction"
    low, high = out.get("low"), out.get("high")
    if fmt.is_number(low) and fmt.is_number(high):
        out["inside"] = bool(low <= measured <= high)
        text += f" of {fmt.loss(predicted)} and {'inside' if out['inside'] else 'outside'} the interval stated beforehand"
        return {**out, "text": f"{text} ({fmt.interval(low, high, fmt.loss)})."}
    return {**out, "inside": None, "text": f"{text} of {fmt.loss(predicted)}, for which no interval could be given."}


def with_production(held_out: dict[str, Any], production: Mapping[str, Any]) -> dict[str, Any]:
    """The production run joins the figure of prediction errors."""
    if not fmt.is_number(production.get("measured")) or not fmt.is_number(production.get("predicted")):
        return held_out
    keys = ("C", "N", "D", "measured", "predicted", "low", "high")
    row = {"label": "production", "production": True, **{k: production.get(k) for k in keys}}
    return {**held_out, "rows": [*held_out.get("rows", []), row]}


def promotion_facts(promotions: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Rows as given (change, stage, verdict, axes {steps, flops, seconds: {gain, low, high, p_value}}), how far stages rank alike,
    and that in words."""
    if not promotions:
        return {"missing": NO_PROMOTIONS}
    rows = [{**p, "axes": dict(p.get("axes") or {})} for p in promotions]
    last = {str(p["change"]): str(p["verdict"]) for p in rows}  # a change's latest stage decides
    parts = []
    for verdict, word in (("adopt", "adopted"), ("undecided", "undecided"), ("reject", "rejected")):
        names = [change for change, found in last.items() if found == verdict]
        parts += [f"{word} {fmt.join(names)}"] if names else []
    text = f"{fmt.plural(len(last), 'change')} in {fmt.plural(len(rows), 'comparison')}, by the latest stage: {'; '.join(parts)}."
    hurt = [c for c, found in last.items() if found == "reject" and any(p["change"] == c and p["verdict"] == "adopt" for p in rows)]
    text += f" Won at a smaller stage and hurts at the latest: {fmt.join(hurt)}." if hurt else ""
    ranks = stage_ranks(rows)
    for r in (r for r in ranks if r["spearman"] is not None):
        text += f" The gains of {r['n']} changes at {' and '.join(r['stages'])} correlate in rank by {r['spearman']:+.2f}."
    return {"rows": rows, "rank_correlations": ranks, "text": text}


def cost_facts(table: RunTable) -> dict[str, Any]:
    """FLOPs and seconds by sweep, the dearest first; NaN where the table does not say."""
    frame = table.frame
    grouped = frame[["sweep", "C", "seconds"]].assign(device_seconds=frame["seconds"] * frame["num_devices"].fillna(1))
    sweeps: list[dict[str, Any]] = [
        {"name": str(name), "runs": len(rows), **_sums(rows)} for name, rows in grouped.groupby("sweep", sort=False)
    ]
    sweeps.sort(key=lambda s: -s["flops"] if math.isfinite(s["flops"]) else 0.0)
    total = _sums(grouped)
    text = f"{fmt.plural(len(frame), 'run')} took {fmt.flops(total['flops'])} FLOPs"
    text += f" and {fmt.duration(total['seconds'])} of training" if math.isfinite(total["seconds"]) else ""
    if len(sweeps) > 1 and total["flops"] > 0:
        text += (
            f"; {sweeps[0]['name'] or 'runs without a sweep'} took {fmt.percent(sweeps[0]['flops'] / total['flops'])} of the FLOPs"
        )
    return {"sweeps": sweeps, "runs": len(frame), **total, "text": text + ". Runs that failed are not counted."}


def _sums(rows: pd.DataFrame) -> dict[str, float]:
    """NaN where none of the runs says it."""
    keys = (("flops", "C"), ("seconds", "seconds"), ("device_seconds", "device_seconds"))
    return {key: float(rows[column].sum(min_count=1)) for key, column in keys}


def run_columns(table: RunTable) -> dict[str, Any]:
    """Every usable run, a list per column; `use` says which laws a run serves."""
    frame = table.frame
    columns: dict[str, list[Any]] = {key: frame[key].tolist() for key in RUN_KEYS if key in frame}
    columns["run_id"] = [r or row for r, row in zip(columns["run_id"], frame["row"], strict=True)]
    columns["use"] = [p.replace(",", ", ").replace("_", " ") for p in assign_purposes(frame)]
    return {"length": len(frame), "columns": columns}
