"""The sections about compute: verdict, isoFLOP, surface, allocation, prediction. Facts in, HTML out.

A missing piece is one line, never an empty plot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from analysis.report import format as fmt
from analysis.report.blocks import Content, Figures, Html, chip, details, join, lead, missing, rich, table, tag

Facts = Mapping[str, Any]
TWO_PREDICTIONS = (
    "This was predicted before the run, for its own N and D. The prediction at the top is for the best N and D at its compute, by "
    "the laws as they are now: the two, and their intervals, may differ a little."
)
NO_INTERVAL = fmt.interval(None, None, str)
NOTICE_WORDS = {"bad": "Problem", "warn": "Caution", "note": "Note"}


def section(anchor: str, title: str, content: Html, status: str | None = None) -> Html:
    heading = tag("h2", [title, chip(status)] if status else title)
    return tag("section", [heading, content], id=anchor)


def masthead(facts: Facts) -> Html:
    source = facts["source"]
    parts = [fmt.plural(source["n_runs"], "run")]
    if facts["budgets"]:
        ends = f"{fmt.scientific(facts['budgets'][0], 2)} to {fmt.scientific(facts['budgets'][-1], 2)} FLOPs"
        parts.append(f"{fmt.plural(len(facts['budgets']), 'budget')}, {ends}")
    parts.append(f"parameters counted as {facts['convention_label']}")
    parts.append(f"data {source['table_hash']}")
    if source.get("generated_at"):
        parts.append(source["generated_at"])
    button = tag("button", "Dark", "toggle", type="button", id="toggle")
    return tag(
        "header",
        [tag("p", "Scaling report", "kicker"), tag("h1", facts["title"]), tag("p", " · ".join(parts), "meta"), button],
        "masthead",
    )


def problems(facts: Facts) -> Html:
    """What forbids using the laws below, before anything else; nothing where there is no such thing."""
    found = [w for w in facts["warnings"] if w["level"] == "bad"]
    return tag("div", _notice_list(found, "Problems"), "warnings") if found else Html("")


def cautions(facts: Facts) -> Html:
    """What to keep in mind, after the verdict: the main ones in full, the rest folded."""
    if not facts["warnings"]:
        return tag("p", "No warnings: nothing in these runs speaks against these laws.", "calm")
    found = [w for w in facts["warnings"] if w["level"] != "bad"]
    main, lesser = ([w for w in found if bool(w.get("lesser")) is folded] for folded in (False, True))
    parts = [_notice_list(main, "Cautions")] if main else []
    if lesser:
        parts.append(details(fmt.plural(len(lesser), "lesser caution"), _notice_list(lesser, "Lesser cautions")))
    return tag("div", parts, "warnings after") if parts else Html("")


def _notice_list(warnings: list[Mapping[str, Any]], label: str) -> Html:
    items = [
        tag("li", [tag("b", NOTICE_WORDS[w["level"]]), tag("span", rich(w["text"]))], w["level"], role="listitem") for w in warnings
    ]
    return tag("ul", items, "notices", aria_label=label)


def verdict(facts: Facts) -> Html:
    block = facts["verdict"]
    sentences = tag("ol", [tag("li", rich(s)) for s in block["sentences"]], "sentences")
    body = [tag("h2", ["Verdict", chip(block["status"])]), stats(block["recommended"], facts)]
    title = "As fitted, not recommended" if block["status"] == "refuse" else "Recommended configuration"
    steps = tag("ul", [tag("li", rich(s)) for s in facts["next_steps"]], "steps")
    left = tag("div", [sentences, tag("h3", "What to do next"), steps])
    body.append(tag("div", [left, config_table(block["recommended"], title)], "columns"))
    return tag("section", body, "verdict", id="verdict")


def stats(target: Facts, facts: Facts) -> Html:
    loss = target.get("loss") or {}
    cells = [
        ("Parameters", fmt.count(target.get("N")), fmt.interval(target.get("N_low"), target.get("N_high"), fmt.count), ""),
        ("Training tokens", fmt.count(target.get("D")), fmt.interval(target.get("D_low"), target.get("D_high"), fmt.count), ""),
        (
            "Tokens per parameter",
            fmt.significant(target.get("ratio")),
            fmt.interval(target.get("ratio_low"), target.get("ratio_high"), fmt.significant),
            "",
        ),
        (
            f"Predicted {facts['loss_name']}",
            fmt.loss(loss.get("value")),
            fmt.interval(loss.get("low"), loss.get("high"), fmt.loss),
            "loss",
        ),
    ]
    return tag(
        "dl",
        [
            tag("div", [tag("dt", n), tag("dd", v), tag("dd", i if i == NO_INTERVAL else f"90%: {i}")], css)
            for n, v, i, css in cells
        ],
        "stats",
    )


def config_table(target: Facts, title: str) -> Html:
    rows: list[tuple[str, str, str]] = [("Compute", f"{fmt.flops(target.get('C'))} FLOPs", target.get("C_note") or "")]
    for key, word, formatter, unit in (
        ("N", "Parameters", fmt.count, ""),
        ("D", "Tokens", fmt.count, ""),
        ("width", "Model width", fmt.whole, ""),
        ("batch_size", "Batch", fmt.whole, " tokens"),
        ("learning_rate", "Matrix learning rate", fmt.significant, ""),
        ("weight_decay", "Weight decay", fmt.significant, ""),
    ):
        value = target.get(key)
        if isinstance(value, Mapping):
            low, high, number = value.get("low"), value.get("high"), value.get("value")
            note = value.get("note") or (fmt.interval(low, high, formatter) if fmt.is_number(number) else "")
        else:
            number, note = value, fmt.interval(target.get(f"{key}_low"), target.get(f"{key}_high"), formatter)
        if fmt.is_number(number):
            assert isinstance(number, (int, float))
            rows.append((word, formatter(number) + unit, note))
        elif isinstance(value, Mapping) and value:
            rows.append((word, "not fitted", note))
    body = [tag("tr", [tag("td", t), tag("td", [v, tag("small", n)] if n else v)]) for t, v, n in rows]
    return tag("table", [tag("caption", title), tag("tbody", body)], "config")


def isoflop(facts: Facts, figures: Figures) -> Html:
    block = facts["isoflop"]
    if block.get("missing"):
        return section("isoflop", "IsoFLOP curves", missing(block["missing"]))
    caption = (
        f"{facts['loss_name'].capitalize()} against model size at equal compute, one colour a budget. Lines are parabolas in "
        "log N; a diamond marks each minimum, its bar the 90% interval; an amber cross marks one that does not lie inside its "
        "grid. The dotted line is the compute-optimal path of the fitted surface."
    )
    rows = []
    for b in block["budgets"]:
        rows.append(
            [
                fmt.scientific(b["C"], 3),
                f"{b['n']:,}",
                fmt.count(b.get("N_opt")),
                fmt.interval(b.get("N_low"), b.get("N_high"), fmt.count),
                fmt.count(b.get("D_opt")),
                fmt.significant(b.get("ratio_opt")),
                fmt.loss(b.get("L_opt")),
                chip(b.get("side") or b["status"]),
            ]
        )
    heads = ["Budget, FLOPs", "Runs", "N*", "90% interval", "D*", "D*/N*", facts["loss_name"], "Minimum"]
    body = [lead(block["text"]), figures.show("isoflop", caption), table(heads, rows, numbers=range(1, 7))]
    return section("isoflop", "IsoFLOP curves", join(body))


def surface(facts: Facts, figures: Figures) -> Html:
    block = facts["parametric"]
    if block.get("missing"):
        return section("surface", "Loss surface", missing(block["missing"]))
    left = figures.show(
        "surface",
        "The fitted surface: lines of equal loss over parameters and tokens, the runs coloured by budget, and the path of least "
        "loss at each compute.",
    )
    right = figures.show(
        "residuals", "What the surface leaves unexplained, run by run. A trend along compute would mean that the form is wrong."
    )
    formula = Html("L(N, D) = E + A / N<sup>α</sup> + B / D<sup>β</sup>")
    body = [
        lead(block["text"]),
        tag("p", formula, "formula"),
        parameter_table(block),
        figures.row("pair", [left, right]),
    ]
    if block.get("variants"):
        body.append(details("The same surface by other estimators", variants_table(block["variants"])))
    return section("surface", "Loss surface", join(body), block["status"])


def parameter_table(block: Facts) -> Html:
    rows = []
    for key, name, meaning in (
        ("E", "E", "loss that no amount of compute removes"),
        ("A", "A", "weight of the term in N"),
        ("B", "B", "weight of the term in D"),
        ("alpha", "α", "how fast size helps"),
        ("beta", "β", "how fast data helps"),
    ):
        low, high = (block.get("intervals") or {}).get(key) or (None, None)
        digits = (lambda v: fmt.significant(v, 4)) if key in ("E", "alpha", "beta") else fmt.significant
        rows.append([name, digits(block[key]), fmt.interval(low, high, digits), meaning])
    return table(["", "Estimate", "90% interval", "Meaning"], rows, numbers=(1, 2))


def variants_table(variants: Facts) -> Html:
    keys = ("E", "A", "B", "alpha", "beta")
    rows = [
        [
            name.replace("huber_1e-3", "Huber, δ = 10⁻³").replace("_", " "),
            *(fmt.significant(fit.get(k), 4) for k in keys),
            chip(str(fit.get("status", ""))),
        ]
        for name, fit in variants.items()
    ]
    return table(["Estimator", "E", "A", "B", "α", "β", "Status"], rows, numbers=(1, 2, 3, 4, 5))


def allocation(facts: Facts, figures: Figures) -> Html:
    block = facts["conventions"]
    if block.get("missing"):
        return section("allocation", "Parameters or tokens", missing(block["missing"]))
    captions = {
        "N": "Best size at each compute.",
        "D": "Best number of tokens.",
        "ratio": "Tokens per parameter; the convention whose line is flattest is the one to plan with.",
    }
    shown = [figures.show(f"allocation_{q}", captions[q]) for q in ("N", "D", "ratio")]
    key = tag(
        "p",
        "Lines are the surface's optimum with its 90% band, points the minima of the parabolas. Accent: "
        + "; ".join(f"{b['label']} ({s})" for b, s in zip(block["by_name"].values(), ("solid", "dashed", "dotted"), strict=False))
        + ". A star marks the recommendation.",
        "text",
    )
    rows, marked = [], []
    for i, (name, b) in enumerate(block["by_name"].items()):
        ends = b.get("ratio_ends") or (None, None)
        rows.append(
            [
                b["label"],
                exponent(b.get("N_exponent")),
                exponent(b.get("D_exponent")),
                f"{fmt.significant(ends[0])} → {fmt.significant(ends[1])}",
                exponent(b.get("ratio_exponent")),
                "steadiest" if name == block.get("steadiest") and len(block["by_name"]) > 1 else "",
            ]
        )
        marked += [i] if name == facts["convention"] else []
    heads: list[Content] = [
        "N counts",
        rich("N* ∝ C^a"),
        rich("D* ∝ C^b"),
        "D/N, lowest → highest budget",
        rich("D/N ∝ C^(b−a)"),
        "",
    ]
    body = [lead(block["text"]), figures.row("triple", shown), key, table(heads, rows, numbers=(1, 2, 3, 4), marked=marked)]
    return section("allocation", "Parameters or tokens", join(body))


def exponent(value: Facts | None) -> str:
    if not value or not fmt.is_number(value.get("value")):
        return fmt.MISSING
    interval = f" ({fmt.interval(value['low'], value.get('high'), _three)})" if fmt.is_number(value.get("low")) else ""
    return _three(value["value"]) + interval


def _three(value: float) -> str:
    return fmt.minus(f"{value:.3f}")


def prediction(facts: Facts, figures: Figures) -> Html:
    frontier, held_out, production = facts["frontier"], facts["held_out"], facts["production"]
    body: list[Html] = [lead(facts["prediction"]["text"])]
    body.append(
        figures.show(
            "frontier",
            "Best loss at each compute and its extrapolation. Diamonds are the budgets' minima; the band is the calibrated 90% "
            "interval; a dashed line shows what the surface says, the spread between the two being the doubt about the form.",
        )
    )
    if held_out.get("missing"):
        body += [tag("h3", "Against runs held out"), missing(held_out["missing"])]
    else:
        body += [tag("h3", "Against runs held out"), lead(held_out["text"])]
        body.append(
            figures.show(
                "errors",
                "How far each prediction missed: the higher budget was hidden, predicted from the lower ones, then compared.",
            )
        )
        if held_out.get("rows"):
            body.append(details("Each budget held out", held_out_table(held_out["rows"])))
    body.append(tag("h3", "Against the production run"))
    body.append(missing(production["missing"]) if production.get("missing") else production_table(production, facts["loss_name"]))
    if fmt.is_number(production.get("predicted")) and fmt.is_number(facts["prediction"].get("value")):
        body.append(tag("p", TWO_PREDICTIONS, "text"))
    if frontier.get("missing"):
        body.insert(1, missing(frontier["missing"]))
    return section("prediction", "Predicted and measured", join(body), facts["prediction"].get("verdict"))


def _minute(when: Any) -> str:
    """2026-11-21T17:38:25+00:00 as 2026-11-21 17:38 UTC; anything else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?(\+00:00|Z)", str(when))
    return f"{found[1]} {found[2]} UTC" if found else str(when)


def held_out_table(held_out: list[Mapping[str, Any]]) -> Html:
    rows = [
        [r["label"], fmt.loss(r["predicted"]), fmt.interval(r.get("low"), r.get("high"), fmt.loss), fmt.loss(r["measured"])]
        for r in held_out
    ]
    return table(["Held out", "Predicted", "90% interval", "Measured"], rows, numbers=(1, 2, 3))


def production_table(production: Facts, loss_name: str) -> Html:
    written = f", written {_minute(production['predicted_at'])}" if production.get("predicted_at") else ""
    rows = [
        ["Run", f"{production.get('name', '')} {production.get('run_id', '')}".strip() or fmt.MISSING],
        ["Size", f"N {fmt.count(production.get('N'))}, D {fmt.count(production.get('D'))}, C {fmt.flops(production.get('C'))}"],
        [
            f"Predicted {loss_name}{written}",
            f"{fmt.loss(production.get('predicted'))} ({fmt.interval(production.get('low'), production.get('high'), fmt.loss)})",
        ],
        [f"Measured {loss_name}", fmt.loss(production.get("measured")) if production.get("measured") is not None else "not yet"],
    ]
    if fmt.is_number(production.get("error")):
        places = {True: "inside the interval", False: "outside the interval", None: "no interval could be given"}
        where = places[production["inside"]]
        rows.append(["Measured − predicted", f"{fmt.percent(production['error'], 2, True)}, {where}"])
    if fmt.is_number(production.get("seconds")):
        rows.append(["Training time", fmt.duration(production["seconds"])])
    return join([lead(production["text"]), table(["Production", ""], rows)])
