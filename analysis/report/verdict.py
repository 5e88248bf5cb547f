"""The verdict: one status, five sentences, one recommended configuration. Reads facts only: every number stands elsewhere too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.report import format as fmt

SETTING_WORDS = {"batch_size": "batch", "learning_rate": "learning rate", "weight_decay": "weight decay"}
WIDTH_NOTE = "no law: read off the runs' own shapes, a line of log width over log N"
ALLOCATION_KEYS = ("by", "C", "N", "N_low", "N_high", "D", "D_low", "D_high", "ratio", "ratio_low", "ratio_high")


def verdict_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """{"status": ok|warn|refuse, "sentences": five, "recommended": {...}} from the other blocks of the facts."""
    prediction = facts["prediction"]
    recommended: dict[str, Any] = {k: prediction.get(k) for k in ALLOCATION_KEYS}
    recommended["C_note"] = _distance(prediction)
    recommended["loss"] = {k: prediction.get(k) for k in ("value", "low", "high", "surface")}
    recommended["width"] = _width(facts.get("width"))
    for name in SETTING_WORDS:
        swept = "not swept" if facts[name].get("missing") else "swept, but no law yet"
        recommended[name] = facts[name].get("target") or {"note": f"{swept}: the recipe's own rule holds"}
    status = _status(facts)
    sentences = [_allocation(facts), _settings(facts), _loss(facts), _evidence(facts), _doubts(facts)]
    if status == "refuse" and fmt.is_number(prediction.get("N")):
        sentences[0] = f"These runs do not carry a recommendation; the fit as it stands says: {_lower(sentences[0])}"
        sentences[1] = sentences[1].replace("Use a", "It would take a", 1)
    return {"status": status, "sentences": sentences, "recommended": recommended}


def _width(value: Any) -> dict[str, Any]:
    """Not a law of these runs: where the number comes from stands beside it."""
    return {"value": value, "note": WIDTH_NOTE} if fmt.is_number(value) else {}


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _status(facts: Mapping[str, Any]) -> str:
    found = facts["prediction"].get("verdict")
    if found == "refuse" or facts["parametric"].get("missing"):
        return "refuse"
    loud = any(w["level"] in ("warn", "bad") for w in facts["warnings"])
    return "warn" if found == "warn" or found is None or loud else "ok"


def _distance(prediction: Mapping[str, Any]) -> str:
    times = prediction.get("extrapolation")
    if not fmt.is_number(times):
        return ""
    return f"{fmt.significant(times, 2)} times the largest fitted compute" if times > 1.0001 else "inside the fitted range"


def _allocation(facts: Mapping[str, Any]) -> str:
    p = facts["prediction"]
    if not fmt.is_number(p.get("N")):
        return "No allocation can be recommended: " + (
            facts["parametric"].get("missing") or "the surface has no optimum in these runs."
        )
    interval = fmt.interval(p.get("ratio_low"), p.get("ratio_high"), fmt.significant)
    several = len(facts["conventions"].get("by_name") or {}) > 1
    where = f", counting {facts['convention_label']}" if several else ""
    if p.get("by") == "minima":
        where += ", by the isoFLOP minima, since the surface is not settled"
    return (
        f"At {fmt.flops(p['C'])} FLOPs train {fmt.count(p['N'])} parameters on {fmt.count(p['D'])} tokens: "
        f"{fmt.significant(p['ratio'])} tokens per parameter (90% interval {interval}){where}."
    )


def _settings(facts: Mapping[str, Any]) -> str:
    known, unknown = [], []
    for name, word in SETTING_WORDS.items():
        target = facts[name].get("target") or {}
        value = target.get("value")
        if not fmt.is_number(value):
            unknown.append(word)
        elif name == "batch_size":
            known.append(f"a batch of {fmt.whole(value)} tokens")
        else:
            known.append(f"a {'matrix ' if name == 'learning_rate' else ''}{word} of {fmt.significant(value)}")
    if not known:
        return "These runs give no law for batch, learning rate or weight decay: the recipe's own rules hold."
    rest = f"; no law for the {fmt.join(unknown)}, where the recipe's own rule holds" if unknown else ""
    return f"Use {fmt.join(known)}{rest}."


def _loss(facts: Mapping[str, Any]) -> str:
    p, production, name = facts["prediction"], facts["production"], facts["loss_name"]
    if fmt.is_number(production.get("error")):
        return str(production["text"])
    if not fmt.is_number(p.get("value")):
        return f"No {name} can be predicted from these runs."
    known = fmt.is_number(p.get("low"))
    interval = f"90% interval {fmt.interval(p['low'], p.get('high'), fmt.loss)}" if known else "no interval can be given"
    if facts["frontier"].get("missing"):
        return f"The surface alone, without a frontier, gives {name} {fmt.loss(p['value'])} ({interval})."
    text = f"Expect {name} {fmt.loss(p['value'])} ({interval}) from the frontier"
    if fmt.is_number(p.get("surface")):
        text += f"; the surface says {fmt.loss(p['surface'])}, {fmt.percent(p['surface'] / p['value'] - 1, 2, True)}"
    return text + "."


def _evidence(facts: Mapping[str, Any]) -> str:
    fit, budgets, noise = facts["parametric"], facts["budgets"], facts["noise"]
    runs = fit.get("n") or facts["source"]["n_runs"]
    text = f"This rests on {fmt.plural(runs, 'run')}"
    if len(budgets) > 1:
        text += f" at {len(budgets)} budgets over a factor {fmt.significant(budgets[-1] / budgets[0], 2)} of compute"
    text += (
        f"; seeds move the loss by {fmt.percent(noise['sigma'])}"
        if fmt.is_number(noise.get("sigma"))
        else "; seed noise is unknown"
    )
    rows = [r for r in facts["held_out"].get("rows") or [] if not r.get("production")]
    if rows:
        error = rows[-1]["measured"] / rows[-1]["predicted"] - 1
        text += f", and the top budget, predicted from the lower ones, was missed by {fmt.percent(abs(error))}"
    return text + "."


def _doubts(facts: Mapping[str, Any]) -> str:
    doubts = [f"the {SETTING_WORDS[name]}, because {d}" for name in SETTING_WORDS if (d := facts[name].get("doubt"))]
    reasons = [str(r).rstrip(".") for r in facts["prediction"].get("reasons") or []]
    if doubts:
        return f"Not settled: {'; '.join(doubts)}."
    if reasons:
        return f"Mind this: {'; '.join(reasons)}."
    return "Nothing in these runs speaks against it."
