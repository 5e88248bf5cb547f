"""The sections about settings and data: batch, learning rate, weight decay, promotions, noise, cost, runs, how to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.report import format as fmt
from analysis.report.blocks import Figures, Html, bar, chip, details, join, lead, rich, table, tag
from analysis.report.sections import section

Facts = Mapping[str, Any]
TITLES = {"batch_size": "Batch size", "learning_rate": "Learning rate", "weight_decay": "Weight decay"}
ANCHORS = {"batch_size": "batch", "learning_rate": "learning-rate", "weight_decay": "weight-decay"}
PROMOTION_NOTE = (
    "Gain is the share by which the loss is lower, at the end of the runs and at equal steps, FLOPs and seconds; a factor says how "
    "much less of that axis the change needs for the same loss. Below stand the 90% interval and the p-value of no gain."
)
AXES = ("steps", "flops", "seconds")
GLOSSARY = (
    ("N, D, C", "Scaling parameters (which ones are counted is stated at the top), training tokens, training FLOPs."),
    (
        "Interval",
        "90% unless it says otherwise. Bars and bands in every figure are intervals; a missing bar means that none is known.",
    ),
    (
        "Diamond, cross",
        "A diamond is an optimum inside its grid. Amber marks one at an edge, or one that noise hides: it is a bound, not a value, "
        "and does not count as an optimum.",
    ),
    (
        "Colour",
        "Budgets run from amber (least compute) to indigo (most). Teal is always what a law says, dark ink what was measured.",
    ),
    (
        "Surface, frontier",
        "The surface fits loss to N and D over all runs and gives the best split of compute. The frontier fits only the best loss "
        "at each budget and gives the prediction, because it extrapolates better.",
    ),
    (
        "Calibrated interval",
        "Its width comes from how far earlier predictions missed: fit the lower budgets, predict the next, collect the errors. "
        "With fewer than four budgets there is no interval.",
    ),
    (
        "ok, with cautions, not recommended",
        "ok: use it. With cautions: usable, read them. Not recommended: the runs do not support it, for example beyond 100 times "
        "the largest fitted compute.",
    ),
    (
        "Hover and click",
        "Hover shows a run's numbers and id. A click opens the run in MLflow where an address was given, else in the table of "
        "runs. Drag to zoom, double-click to go back.",
    ),
)


def setting(facts: Facts, figures: Figures, name: str) -> Html:
    block = facts[name]
    anchor, title = ANCHORS[name], TITLES[name]
    cells = figures.show(
        f"{name}_cells",
        "Every cell's own sweep: loss above its best run. A line follows the best run at each value; points off it differ in "
        "another setting. Diamonds on the floor are the fitted optima with their intervals; amber marks have none inside "
        "their grid.",
    )
    laws = [
        figures.show(f"{name}_law_{i}" if i else f"{name}_law", caption)
        for i, caption in enumerate(block.get("law_captions") or ["The law through the cells' optima, with its 90% band."])
    ]
    body = [lead(block["text"])]
    shown = [f for f in laws if f.text]
    body.append(figures.row("pair", [cells, shown[0]]) if len(shown) == 1 else cells)
    if len(shown) > 1:
        body.append(figures.row("triple" if len(shown) == 3 else "pair", shown))
    if block.get("candidates"):
        body.append(candidate_table(block))
    if block.get("cells"):
        body.append(details(f"All {fmt.plural(len(block['cells']), 'cell')}", cell_table(block["cells"], name)))
    return section(anchor, title, join(body), block.get("status"))


def candidate_table(block: Facts) -> Html:
    rows: list[list[Any]] = []
    for c in block["candidates"]:
        rows.append(
            [
                c["label"],
                rich(c["form"]),
                rich(c["exponent_text"]),
                c.get("error_text") or fmt.MISSING,
                c["prediction_text"],
                chip(c["status"]),
            ]
        )
    marked = []
    if block.get("average_text"):
        marked = [len(rows)]
        rows.append(["average of the candidates", "", "", "", block["average_text"], chip("averaged")])
    heads = ["Predictor", "Form", "Exponent", "Error on a scale left out", "At the target", "Status"]
    return table(heads, rows, numbers=(2, 3, 4), marked=marked)


def cell_table(cells: Sequence[Facts], name: str) -> Html:
    formatter = fmt.whole if name == "batch_size" else fmt.significant
    rows = [
        [
            fmt.count(c.get("N")),
            fmt.count(c.get("D")),
            f"{c['width']:.0f}" if fmt.is_number(c.get("width")) else fmt.MISSING,
            formatter(c["value"]) if fmt.is_number(c.get("value")) else fmt.MISSING,
            fmt.interval(c.get("low"), c.get("high"), formatter),
            formatter(c["argmin"]) if fmt.is_number(c.get("argmin")) else fmt.MISSING,
            str(c.get("n", "")),
            chip(str(c.get("edge") or "interior")),
        ]
        for c in cells
    ]
    return table(["N", "D", "Width", "Optimum", "90% interval", "Best run's", "Runs", "Where"], rows, numbers=range(7))


def promotions(facts: Facts) -> Html:
    block = facts["promotions"]
    rows = []
    for p in block["rows"]:
        change = join([str(p["change"]), tag("small", str(p["reason"]), "why")]) if p.get("reason") else str(p["change"])
        axes = [axis_text(p if fmt.is_number(p.get("gain")) else None), *(axis_text(p["axes"].get(a)) for a in AXES)]
        rows.append([change, str(p["stage"]), chip(p["verdict"]), *axes, str(p.get("n_seeds") or "")])
    heads = ["Change", "Stage", "Verdict", "Gain", "at equal steps", "at equal FLOPs", "at equal seconds", "Seeds"]
    note = tag("p", PROMOTION_NOTE, "text")
    return section("promotions", "Stage promotions", join([lead(block["text"]), table(heads, rows, numbers=(7,)), note]))


def axis_text(axis: Facts | None) -> Html | str:
    if not axis or not fmt.is_number(axis.get("gain")):
        return fmt.MISSING
    small = []
    if fmt.is_number(axis.get("low")):
        small.append(fmt.interval(axis["low"], axis["high"], lambda v: fmt.percent(v, 2, True)))
    if fmt.is_number(axis.get("p_value")):
        small.append(f"p {fmt.significant(axis['p_value'], 2)}")
    factor = axis.get("multiplier")
    gain = fmt.percent(axis["gain"], 2, True) + (f" · {factor:.2f}×" if fmt.is_number(factor) else "")
    return join([gain, *(tag("small", line) for line in small)])


def noise(facts: Facts, figures: Figures) -> Html:
    block = facts["noise"]
    caption = "Runs that differ only in their seed, as deviation from their group's mean. The band is one standard deviation."
    return section("noise", "Noise", join([lead(block["text"]), figures.show("noise", caption)]))


def cost(facts: Facts) -> Html:
    block = facts["cost"]
    most = max((s["flops"] or 0.0 for s in block["sweeps"]), default=0.0) or 1.0
    rows: list[list[Any]] = []
    for s in block["sweeps"]:
        share = (s["flops"] or 0.0) / most
        rows.append(
            [
                s["name"] or "unnamed",
                f"{s['runs']:,}",
                fmt.flops(s["flops"]),
                bar(share),
                fmt.duration(s["seconds"]),
                fmt.duration(s["device_seconds"]),
            ]
        )
    rows.append(
        [
            "all",
            f"{block['runs']:,}",
            fmt.flops(block["flops"]),
            "",
            fmt.duration(block["seconds"]),
            fmt.duration(block["device_seconds"]),
        ]
    )
    heads = ["Sweep", "Runs", "FLOPs", "", "Training time", "Device time"]
    shown = table(heads, rows, numbers=(1, 2, 4, 5), marked=[len(rows) - 1])
    return section("cost", "Cost", join([lead(block["text"]), shown]))


def runs(facts: Facts) -> Html:
    source = facts["source"]
    facts_rows = [
        ["Source", source["table"]],
        ["Hash of the runs", source["table_hash"]],
        ["Hash in the laws", source["laws_hash"]],
    ]
    facts_rows += [["Note", note] for note in source["notes"]]
    body = [lead(source["text"]), details("Where the data comes from", table(["", ""], facts_rows))]
    if facts["left_out"]:
        rows = [[r["row"], r["reason"]] for r in facts["left_out"][:500]]
        more = len(facts["left_out"]) - len(rows)
        shown = join(
            [table(["Row", "Reason"], rows), tag("p", f"and {more:,} more, in the JSON facts", "text") if more > 0 else Html("")]
        )
        body.append(details(f"{fmt.plural(len(facts['left_out']), 'row')} left out, with reasons", shown))
    tools = [
        tag("input", "", id="filter", type="search", placeholder="Filter by run, name, sweep, stage", aria_label="Filter runs"),
        tag("label", ["Sweep ", tag("select", tag("option", "all", value=""), id="by-sweep")]),
        tag("label", ["Used for ", tag("select", tag("option", "all", value=""), id="by-status")]),
        tag("span", "", "count", id="count", aria_live="polite"),
    ]
    frame = tag("table", [tag("thead", tag("tr", "")), tag("tbody", "")], "data", id="runs-table")
    more_button = tag("button", "Show more", "more", type="button", id="more")
    body += [tag("div", tools, "tools"), tag("div", frame, "scroll"), more_button]
    return section("runs", "Data and runs", join(body))


def absent(lines: Sequence[tuple[str, str]]) -> Html:
    """What these runs say nothing about, a line each."""
    parts = [part for title, text in lines for part in (tag("dt", title), tag("dd", rich(text)))]
    return section("absent", "Not in these runs", tag("dl", parts, "glossary"))


def how_to_read() -> Html:
    terms = [part for word, text in GLOSSARY for part in (tag("dt", word), tag("dd", text))]
    return section("reading", "How to read this", tag("dl", terms, "glossary"))
