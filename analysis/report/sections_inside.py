"""The section about what happened inside a run, and where the steps' time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.report import format as fmt
from analysis.report.blocks import Figures, Html, join, lead, missing, table, tag
from analysis.report.facts_inside import PARTS
from analysis.report.sections import section

CAPTIONS = {
    "inside_gradient": "Norm of the gradient, all matrices of a layer together.",
    "inside_update": "Norm of the update that the optimizer made of it.",
    "inside_ratio": "Update over weight, the median of a layer's matrices. The dotted line, 10^−3, is about healthy.",
    "inside_units": "Share of relu² units that no position made fire (solid), and that every position did (dashed).",
    "inside_logits": "Largest scaled query-key product; at most 1.44·√head_dim, since both are normalized.",
    "inside_lambdas": "The learned mixing scalars: residual (solid) and x0 (dashed) of each layer, smear and backout.",
}


def inside(facts: Mapping[str, Any], figures: Figures) -> Html:
    block = facts["inside"]
    body: list[Html] = []
    if block.get("missing"):
        body.append(missing(block["missing"]))
    else:
        shown = [figures.show(name, caption) for name, caption in CAPTIONS.items()]
        body += [lead(block["text"]), figures.row("triple", shown[:3]), figures.row("triple", shown[3:])]
    if block["times"]:
        body += [tag("h3", "Where a step's time goes"), times_table(block["times"])]
    return section("inside", "Inside the runs", join(body))


def times_table(times: list[Mapping[str, Any]]) -> Html:
    """Medians over a sweep's runs."""
    rows = [
        [
            t["sweep"] or "unnamed",
            f"{t['runs']:,}",
            fmt.whole(t["num_devices"]),
            *(fmt.percent(t["shares"][part]) for part in PARTS),
            fmt.percent(t["straggler"]) if fmt.is_number(t["straggler"]) else "",
            fmt.duration(t["startup_seconds"]),
        ]
        for t in times
    ]
    heads = [
        "Sweep",
        "Runs",
        "Ranks",
        "Data",
        "Compute",
        "Wait",
        "Communication",
        "Optimizer",
        "Slowest over fastest",
        "First step",
    ]
    return table(heads, rows, numbers=range(1, len(heads)))
