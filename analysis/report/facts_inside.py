"""Facts about what happened inside a run: norms and ratios by layer, units, logits, lambdas; and where its steps' time went."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.report import format as fmt
from analysis.table import RunTable

HEALTHY_RATIO = 1e-3  # update over weight a step, the common rule of thumb (Karpathy's "makemore" lectures)
FAR_RATIO = 10.0  # times off it: worth a look
PARTS = ("data", "compute", "wait", "communication", "optimizer")  # of a step, as records name them
NO_INSIDE = (
    "No run measured its inside. `--set runtime.diagnostics_every_steps=100` on a sweep, or `--diagnostics-every-steps 100` on a "
    "single run, measures every 100th step: gradients and updates by layer, dead units, attention logits, lambdas."
)
LAYER_WEIGHT = re.compile(r"^h\.(\d+)\.")
BY_LAYER = {"dead": "dead_units", "saturated": "saturated_units", "logit": "attention_logit_max"}
Series = list[float | None]


def inside_facts(table: RunTable) -> dict[str, Any]:
    """The run that measured its inside (production first, else the one of most compute), by layer over steps, and the shares of
    a step's time by sweep."""
    times = time_facts(table)
    chosen = _chosen(table)
    if chosen is None:
        return {"missing": NO_INSIDE, "times": times}
    row, columns, others = chosen
    block: dict[str, Any] = {
        "run_id": row["run_id"],
        "name": row["name"],
        "others": others,
        "step": list(columns["step"]),
        "gradient": _by_layer(columns, "gradient_norm", _root_of_squares),
        "update": _by_layer(columns, "update_norm", _root_of_squares),
        "ratio": _by_layer(columns, "update_to_weight", _median),
        "lambdas": {k: v for k, v in columns.items() if k.partition("/")[0] in ("resid_lambda", "x0_lambda")}
        | {k.removesuffix("_lambda"): columns[k] for k in ("smear_lambda", "backout_lambda") if k in columns},
        **{key: _numbered(columns, name) for key, name in BY_LAYER.items()},
        "times": times,
    }
    return {**block, "text": _text(block)}


def _chosen(table: RunTable) -> tuple[Mapping[str, Any], Mapping[str, Series], int] | None:
    frame = table.frame
    measured = frame[frame["run_id"].isin([r for r, inside in table.inside.items() if inside["diagnostics"].get("step")])]
    if measured.empty:
        return None
    order = measured.assign(first=measured["purpose"].str.contains("production")).sort_values(["first", "C"], ascending=False)
    row = {str(k): v for k, v in order.iloc[0].to_dict().items()}  # pandas knows keys as hashables only
    return row, table.inside[row["run_id"]]["diagnostics"], len(measured) - 1


def _by_layer(columns: Mapping[str, Series], kind: str, combine: Any) -> dict[str, Series]:
    """A series a layer (over its matrices), then the two large tables'."""
    groups: dict[str, list[Series]] = {}
    for key, series in columns.items():
        name = key.removeprefix(kind + "/")
        layer = LAYER_WEIGHT.match(name)
        if name != key and (layer or name in ("wte", "lm_head")):
            groups.setdefault(f"layer {layer[1]}" if layer else name, []).append(series)
    return {g: [combine([v for v in at if v is not None]) for at in zip(*s, strict=True)] for g, s in groups.items()}


def _numbered(columns: Mapping[str, Series], kind: str) -> dict[str, Series]:
    return {f"layer {k.partition('/')[2]}": v for k, v in columns.items() if k.startswith(kind + "/")}


def _root_of_squares(values: Sequence[float]) -> float | None:
    return math.sqrt(sum(v * v for v in values)) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _last(series: Mapping[str, Series]) -> dict[str, float]:
    """The newest number of each series that has one."""
    found = {name: [v for v in values if v is not None] for name, values in series.items()}
    return {name: values[-1] for name, values in found.items() if values}


def _text(block: Mapping[str, Any]) -> str:
    name = f"{block['name']} ({block['run_id']})" if block["name"] else str(block["run_id"])
    text = f"Run {name}, measured at {fmt.plural(len(block['step']), 'step')} up to step {block['step'][-1]:,}."
    ratios = _last({k: v for k, v in block["ratio"].items() if k.startswith("layer")})
    if ratios:
        low, high = min(ratios.values()), max(ratios.values())
        span = fmt.interval(low, high, fmt.significant) if high > low else fmt.significant(low)
        text += f" The last update moved its layers by {span} of their weights"
        far = [k for k, v in ratios.items() if not HEALTHY_RATIO / FAR_RATIO <= v <= HEALTHY_RATIO * FAR_RATIO]
        text += f" (about 10^−3 is healthy; {fmt.join(far)} is far off)." if far else " (about 10^−3 is healthy)."
    dead, saturated, logits = (_last(block[k]) for k in ("dead", "saturated", "logit"))
    if dead:
        worst = max(dead, key=lambda k: dead[k])
        text += f" At most {fmt.percent(dead[worst])} of relu² units never fired ({worst})"
        text += f", {fmt.percent(max(saturated.values(), default=0.0))} always did."
    if logits:
        text += f" The largest attention logit was {fmt.significant(max(logits.values()))}."
    return text + (f" {fmt.plural(block['others'], 'other run')} measured as well." if block["others"] else "")


def time_facts(table: RunTable) -> list[dict[str, Any]]:
    """By sweep and number of devices: the median share of each part of a step, the median straggler (slowest rank's computation
    over the fastest's) and the median seconds until the first step was done."""
    frame = table.frame[table.frame["run_id"].isin([r for r, inside in table.inside.items() if inside["step_seconds"]])]
    rows = []
    for (sweep, devices), group in frame.groupby(["sweep", "num_devices"], sort=False, dropna=False):
        insides = [table.inside[r] for r in group["run_id"]]
        shares: dict[str, list[float]] = {part: [] for part in PARTS}
        for inside in insides:
            total = sum(inside["step_seconds"].values())
            for part in PARTS:
                shares[part].append(inside["step_seconds"].get(part, 0.0) / total)
        lag = [max(r) / min(r) - 1 for i in insides if len(r := i["rank_compute_seconds"]) > 1 and min(r) > 0]
        rows.append(
            {
                "sweep": sweep,
                "num_devices": devices,
                "runs": len(insides),
                "shares": {part: statistics.median(values) for part, values in shares.items()},
                "straggler": statistics.median(lag) if lag else None,
                "startup_seconds": statistics.median(sum(i["startup_seconds"].values()) for i in insides),
            }
        )
    return rows
