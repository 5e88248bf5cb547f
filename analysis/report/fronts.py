"""Searches with several objectives: which candidates no other beats in all of them. Facts, section and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.report import format as fmt
from analysis.report.blocks import Figures, Html, join, lead, table
from analysis.report.sections import section

NO_FRONTS = "No search with several objectives among these sweeps."
TITLE = "Several objectives"


def front_facts(fronts: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """`fronts`: see write_report. Rows for the tables and one sentence a sweep."""
    known = [sweep_front(f) for f in fronts or () if any(f["cells"].values())]
    return {"sweeps": known} if known else {"missing": NO_FRONTS}


def sweep_front(front: Mapping[str, Any]) -> dict[str, Any]:
    """One sweep's candidates with their cell, its metrics, and a sentence."""
    points = [{**p, "cell": cell} for cell, candidates in front["cells"].items() for p in candidates]
    best = [p for p in points if p["on_front"]]
    metrics = list(front["objectives"])
    text = (
        f"{front['sweep']}: {front['question']} Of {fmt.plural(len(points), 'candidate')}, {len(best)} are beaten by no other of "
        f"their cell in all of {fmt.join(metrics)}."
    )
    return {"sweep": front["sweep"], "metrics": metrics, "points": points, "text": text}


def front_rows(sweep: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the candidates on the front, cell by cell."""
    rows = [
        [p["cell"], ", ".join(f"{k}={_value(v)}" for k, v in p["values"].items()), *(_value(p[m]) for m in sweep["metrics"])]
        for p in sweep["points"]
        if p["on_front"]
    ]
    return ["Cell", "Candidate", *sweep["metrics"]], rows


def _value(value: Any) -> str:
    return fmt.significant(value, 4) if fmt.is_number(value) else str(value)


def fronts_section(facts: Mapping[str, Any], figures: Figures) -> Html:
    block = facts["fronts"]
    parts = []
    for i, sweep in enumerate(block["sweeps"]):
        heads, rows = front_rows(sweep)
        caption = f"Every candidate of {sweep['sweep']}; a line joins those that no other beats in all objectives."
        parts += [lead(sweep["text"]), figures.show(f"front_{i}", caption), table(heads, rows, numbers=range(2, len(heads)))]
    return section("fronts", TITLE, join(parts))
