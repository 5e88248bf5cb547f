"""One self-contained HTML file: template, style, script and plotly.js inline; nothing is ever fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from importlib import resources
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from analysis.report import fronts, sections, sections_inside, sections_settings
from analysis.report.blocks import Figures, Html, join, tag
from analysis.report.figures import build_figures
from analysis.report.figures.theme import dark_twins

CONTENTS = (
    ("verdict", "Verdict"),
    ("isoflop", "IsoFLOP curves"),
    ("surface", "Loss surface"),
    ("allocation", "Parameters or tokens"),
    ("batch", "Batch size"),
    ("learning-rate", "Learning rate"),
    ("weight-decay", "Weight decay"),
    ("promotions", "Stage promotions"),
    ("fronts", fronts.TITLE),
    ("prediction", "Predicted and measured"),
    ("noise", "Noise"),
    ("inside", "Inside the runs"),
    ("cost", "Cost"),
    ("absent", "Not in these runs"),
    ("runs", "Data and runs"),
    ("reading", "How to read this"),
)
# Sections that many tables of runs have nothing for, by their facts: one line each under "Not in these runs" is enough then.
OPTIONAL = {
    "batch": "batch_size",
    "learning-rate": "learning_rate",
    "weight-decay": "weight_decay",
    "promotions": "promotions",
    "fronts": "fronts",
    "noise": "noise",
    "inside": "inside",
}
# Columns of the table of runs: key in facts["runs"], heading, kind (how report.js writes it).
RUN_COLUMNS = (
    ("run_id", "Run", "text"),
    ("L", "Loss", "loss"),
    ("N", "N", "count"),
    ("D", "D", "count"),
    ("C", "FLOPs", "flops"),
    ("B", "Batch", "whole"),
    ("lr", "LR", "plain"),
    ("weight_decay", "Decay", "plain"),
    ("seed", "Seed", "plain"),
    ("seconds", "Time", "seconds"),
    ("use", "Used for", "text"),
    ("sweep", "Sweep", "text"),
    ("stage", "Stage", "text"),
    ("name", "Name", "text"),
    ("device", "Device", "text"),
)


def render(facts: Mapping[str, Any], drawn: pd.DataFrame, *, run_url: str | None = None) -> str:
    """The whole page. `drawn` are the runs shown as points (all, or a sample); `run_url` holds {run_id}, or None."""
    figures = Figures(build_figures(facts, drawn))
    main = join([*page_sections(facts, figures), _footer(facts)])
    values = {
        "title": escape(facts["title"]),
        "css": _asset("report.css"),
        "contents": str(_contents(facts)),
        "main": str(main),
        "settings": script_json({"run_url": run_url}),
        "twins": script_json(dark_twins()),
        "figures": "{" + ",".join(f"{script_json(n)}:{_safe(figures.by_name[n].to_json())}" for n in figures.shown) + "}",
        "runs": script_json(_run_columns(facts["runs"])),
        "plotly": get_plotlyjs(),
        "js": _asset("report.js"),
    }
    page = _asset("report.html")
    parts = page.split("{{")
    out = [parts[0]]
    for part in parts[1:]:
        name, rest = part.split("}}", 1)
        out += [values[name], rest]
    return "".join(out)


def page_sections(facts: Mapping[str, Any], figures: Figures) -> list[Html]:
    """The page from its masthead to how to read it. `figures` without any gives the words and tables alone."""
    absent = absent_sections(facts)
    made: dict[str, Callable[[], Html]] = {
        "verdict": lambda: sections.verdict(facts),
        "isoflop": lambda: sections.isoflop(facts, figures),
        "surface": lambda: sections.surface(facts, figures),
        "allocation": lambda: sections.allocation(facts, figures),
        **{anchor: partial(sections_settings.setting, facts, figures, name) for name, anchor in sections_settings.ANCHORS.items()},
        "promotions": lambda: sections_settings.promotions(facts),
        "fronts": lambda: fronts.fronts_section(facts, figures),
        "prediction": lambda: sections.prediction(facts, figures),
        "noise": lambda: sections_settings.noise(facts, figures),
        "inside": lambda: sections_inside.inside(facts, figures),
        "cost": lambda: sections_settings.cost(facts),
        "absent": lambda: sections_settings.absent(absent),
        "runs": lambda: sections_settings.runs(facts),
        "reading": sections_settings.how_to_read,
    }
    shown = [made[anchor]() for anchor, _ in shown_contents(facts)]
    return [sections.masthead(facts), sections.problems(facts), shown[0], sections.cautions(facts), *shown[1:]]


def absent_sections(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, one line) of every optional section for which the runs hold nothing."""
    titles = dict(CONTENTS)
    blocks = {anchor: facts[name] for anchor, name in OPTIONAL.items()}
    return [(titles[a], block["missing"]) for a, block in blocks.items() if block.get("missing") and not block.get("times")]


def shown_contents(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchors and titles of the sections that this page has."""
    absent = {title for title, _ in absent_sections(facts)}
    return [(anchor, title) for anchor, title in CONTENTS if (absent if anchor == "absent" else title not in absent)]


def script_json(value: Any) -> str:
    """JSON that may stand inside a <script> element: no character can end it. NaN is refused (it is not JSON)."""
    return _safe(json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False))


def _safe(text: str) -> str:
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (resources.files("analysis.report") / "template" / name).read_text(encoding="utf8")


def _contents(facts: Mapping[str, Any]) -> Html:
    items = [tag("li", tag("a", title, href=f"#{anchor}")) for anchor, title in shown_contents(facts)]
    return tag("nav", tag("ol", items), "toc", aria_label="Contents")


def _footer(facts: Mapping[str, Any]) -> Html:
    return tag("footer", f"nanoladder {facts['source']['version']} · one file, nothing is loaded from elsewhere")


def _run_columns(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that hold anything, texts as indices into their levels (most repeat), numbers at five digits."""
    columns = []
    for key, title, kind in RUN_COLUMNS:
        values = runs["columns"].get(key)
        if values is None or not any(v not in (None, "") for v in values):
            if key not in ("run_id", "sweep", "use"):
                continue
            values = values or [""] * runs["length"]
        column: dict[str, Any] = {"key": key, "title": title, "kind": kind}
        if kind == "text":
            levels = {str(v or ""): None for v in values}
            order = {level: i for i, level in enumerate(sorted(levels) if key != "run_id" else levels)}
            column |= {"levels": list(order), "values": [order[str(v or "")] for v in values]}
        else:
            column["values"] = [None if v is None else float(f"{v:.5g}") for v in values]
        columns.append(column)
    return {"length": runs["length"], "columns": columns}
