"""The facts as Markdown: the same numbers as the page, without figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.report import format as fmt

Facts = Mapping[str, Any]
LEVEL_WORDS = {"bad": "Problem", "warn": "Caution", "note": "Note"}
SETTINGS = (("batch_size", "Batch size"), ("learning_rate", "Learning rate"), ("weight_decay", "Weight decay"))


def to_markdown(facts: Facts) -> str:
    """One Markdown document (GitHub's tables) from the dict of report_facts."""
    parts = [f"# {facts['title']}", _meta(facts)]
    parts += [f"- **{LEVEL_WORDS[w['level']]}:** {w['text']}" for w in facts["warnings"]]
    parts += ["## Verdict: " + facts["verdict"]["status"], *(f"{i}. {s}" for i, s in enumerate(facts["verdict"]["sentences"], 1))]
    parts += [_recommended(facts["verdict"]["recommended"])]
    parts += _isoflop(facts) + _surface(facts) + _allocation(facts)
    for name, title in SETTINGS:
        parts += _setting(facts[name], name, title)
    parts += _promotions(facts["promotions"]) + _prediction(facts)
    parts += ["## Noise", _text(facts["noise"]), *_cost(facts["cost"]), *_runs(facts)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _meta(facts: Facts) -> str:
    source = facts["source"]
    return f"{fmt.plural(source['n_runs'], 'run')} of {source['table']}, data {source['table_hash']}, {source['generated_at']}."


def _text(block: Facts) -> str:
    return str(block.get("missing") or block.get("text") or "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in line) + " |" for line in lines)


def _recommended(target: Facts) -> str:
    rows = [["Compute", f"{fmt.flops(target.get('C'))} FLOPs", target.get("C_note") or ""]]
    for key, title in (("N", "Parameters"), ("D", "Tokens")):
        rows.append(
            [title, fmt.count(target.get(key)), fmt.interval(target.get(f"{key}_low"), target.get(f"{key}_high"), fmt.count)]
        )
    for key, title in SETTINGS:
        block = target.get(key) or {}
        formatter = fmt.whole if key == "batch_size" else fmt.significant
        note = block.get("note") or fmt.interval(block.get("low"), block.get("high"), formatter)
        rows.append([title, formatter(block.get("value")), note])
    loss = target.get("loss") or {}
    rows.append(["Predicted loss", fmt.loss(loss.get("value")), fmt.interval(loss.get("low"), loss.get("high"), fmt.loss)])
    return _table(["Recommended", "Value", "90% interval"], rows)


def _isoflop(facts: Facts) -> list[str]:
    block = facts["isoflop"]
    rows = [
        [
            fmt.scientific(b["C"]),
            f"{b['n']:,}",
            fmt.count(b.get("N_opt")),
            fmt.interval(b.get("N_low"), b.get("N_high"), fmt.count),
            fmt.count(b.get("D_opt")),
            fmt.significant(b.get("ratio_opt")),
            fmt.loss(b.get("L_opt")),
            str(b.get("side") or b.get("status")),
        ]
        for b in block.get("budgets") or []
    ]
    heads = ["Budget, FLOPs", "Runs", "N*", "90% interval", "D*", "D*/N*", facts["loss_name"], "Minimum"]
    return ["## IsoFLOP curves", _text(block), _table(heads, rows) if rows else ""]


def _surface(facts: Facts) -> list[str]:
    block = facts["parametric"]
    if block.get("missing"):
        return ["## Loss surface", block["missing"]]
    intervals = block.get("intervals") or {}
    rows = []
    for key in ("E", "A", "B", "alpha", "beta"):
        low, high = intervals.get(key) or (None, None)
        rows.append([key, fmt.significant(block[key], 4), fmt.interval(low, high, lambda v: fmt.significant(v, 4))])
    formula = "L(N, D) = E + A/N^alpha + B/D^beta"
    return [
        "## Loss surface",
        _text(block),
        f"`{formula}`, status {block['status']}",
        _table(["", "Estimate", "90% interval"], rows),
    ]


def _allocation(facts: Facts) -> list[str]:
    block = facts["conventions"]
    rows = []
    for name, b in (block.get("by_name") or {}).items():
        ends = b.get("ratio_ends") or (None, None)
        exponents = [fmt.significant((b.get(k) or {}).get("value")) for k in ("N_exponent", "D_exponent")]
        mark = "steadiest" if name == block.get("steadiest") else ""
        rows.append([b["label"], *exponents, f"{fmt.significant(ends[0])} to {fmt.significant(ends[1])}", mark])
    heads = ["N counts", "N* exponent", "D* exponent", "D/N, lowest to highest budget", ""]
    return ["## Parameters or tokens", _text(block), _table(heads, rows) if rows else ""]


def _setting(block: Facts, name: str, title: str) -> list[str]:
    formatter = fmt.whole if name == "batch_size" else fmt.significant
    rows = [
        [
            fmt.count(c.get("N")),
            fmt.count(c.get("D")),
            formatter(c.get("value")),
            fmt.interval(c.get("low"), c.get("high"), formatter),
            str(c.get("edge") or "interior"),
        ]
        for c in block.get("cells") or []
    ]
    shown = _table(["N", "D", "Optimum", "90% interval", "Where"], rows) if rows else ""
    candidates = [
        [c["label"], c["form"], c["exponent_text"], c.get("error_text") or "", c["prediction_text"]]
        for c in block.get("candidates") or []
    ]
    heads = ["Predictor", "Form", "Exponent", "Error on a scale left out", "At the target"]
    return [f"## {title}", _text(block), _table(heads, candidates) if candidates else "", shown]


def _promotions(block: Facts) -> list[str]:
    rows = []
    for p in block.get("rows") or []:
        axes = [_axis(p), *(_axis(p["axes"].get(a)) for a in ("steps", "flops", "seconds"))]
        rows.append([p["change"], p["stage"], p["verdict"], *axes])
    heads = ["Change", "Stage", "Verdict", "Gain", "at equal steps", "at equal FLOPs", "at equal seconds"]
    return ["## Stage promotions", _text(block), _table(heads, rows) if rows else ""]


def _axis(axis: Facts | None) -> str:
    if not axis or not fmt.is_number(axis.get("gain")):
        return fmt.MISSING
    p = f", p {fmt.significant(axis['p_value'], 2)}" if fmt.is_number(axis.get("p_value")) else ""
    return f"{fmt.percent(axis['gain'], 2, True)} ({fmt.interval(axis.get('low'), axis.get('high'), fmt.percent)}{p})"


def _prediction(facts: Facts) -> list[str]:
    rows = [
        [r["label"], fmt.loss(r["predicted"]), fmt.interval(r.get("low"), r.get("high"), fmt.loss), fmt.loss(r["measured"])]
        for r in facts["held_out"].get("rows") or []
    ]
    shown = _table(["Held out", "Predicted", "90% interval", "Measured"], rows) if rows else ""
    parts = ["## Predicted and measured", _text(facts["prediction"]), _text(facts["held_out"]), shown, _text(facts["production"])]
    return parts


def _cost(block: Facts) -> list[str]:
    rows = [[s["name"] or "unnamed", f"{s['runs']:,}", fmt.flops(s["flops"]), fmt.duration(s["seconds"])] for s in block["sweeps"]]
    return ["## Cost", _text(block), _table(["Sweep", "Runs", "FLOPs", "Training time"], rows)]


def _runs(facts: Facts) -> list[str]:
    columns = facts["runs"]["columns"]
    rows = [
        [columns["run_id"][i], columns["use"][i], *(fmt.count(columns[k][i]) for k in ("N", "D")), fmt.loss(columns["L"][i])]
        for i in range(facts["runs"]["length"])
    ]
    gone = [[r["row"], r["reason"]] for r in facts["left_out"]]
    parts = ["## Data and runs", facts["source"]["text"], _table(["Run", "Used for", "N", "D", facts["loss_name"]], rows)]
    return [*parts, "### Left out", _table(["Row", "Reason"], gone)] if gone else parts
