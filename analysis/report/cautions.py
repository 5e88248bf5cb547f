"""Warnings in plain words, the worst first: those that the fits gave, and what only the table can tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from analysis.report import format as fmt
from analysis.table import RunTable

LEVELS = ("bad", "warn", "note")
EXPONENT_FORM = re.compile(r"(?<![\w.])\d(?:\.\d+)?e[+-]?\d+\b")  # 4e+11, as Python prints it
LEFT_OUT = re.compile(r"\d+ rows? (is|are) left out")  # a fact; a large share gets its own warning
BUDGET = re.compile(r"budget (?P<budget>\S+) FLOPs \((?P<status>[^)]*)\): (?P<message>.*)$")
STATUS_ADVICE = {"too few": "fewer than three sizes, no parabola"}
MANY_LEFT_OUT = 0.1  # share of rows left out from which a reader should know at once
MOST_SHOWN = 4  # cautions above the verdict: more are not read
SECTION = re.compile(r"(Batch size|Learning rate|Weight decay|D/N is steadiest|[Bb]udgets? |Frontier: \d|Embeddings are .* middle)")
STATUSES = ("at bound", "not identifiable", "too few", "no law", "an N term")
ECHOES = (("The frontier is at a bound", "Frontier: "), ("The parametric surface is", "Allocation: "))
SETTING_TITLES = {"batch_size": "Batch size", "learning_rate": "Learning rate", "weight_decay": "Weight decay"}


def warning_facts(raw: Mapping[str, Any], table: RunTable, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"level": bad|warn|note, "text", "lesser"}], without repetition, those that change a decision first. `lesser`: what a
    section tells too, or no decision hangs on; the page folds them."""
    found: list[dict[str, str]] = []
    laws_hash = str(raw.get("source_hash") or "")
    if laws_hash and not _fitted_to(table, laws_hash):
        text = f"The laws were fitted to other runs (hash {laws_hash}) than this table (hash {table.hash}); fit again."
        found.append({"level": "bad", "text": text})
    verdict = facts["prediction"].get("verdict")
    for reason in facts["prediction"].get("reasons") or []:
        found.append({"level": "bad" if verdict == "refuse" else "warn", "text": sentence(reason)})
    for source in (raw.get("warnings"), (raw.get("allocation") or {}).get("warnings")):
        source = _budgets_together([str(w) if not isinstance(w, Mapping) else w for w in source or []])
        found += [as_warning(w) for w in source if not str(w).startswith("prediction: ")]  # those are above, as reasons
    rows = len(table) + len(table.left_out)
    if rows and len(table.left_out) > MANY_LEFT_OUT * rows:
        text = (
            f"{len(table.left_out):,} of {rows:,} rows were left out ({fmt.percent(len(table.left_out) / rows)}); see the reasons."
        )
        found.append({"level": "warn", "text": text})
    unique: dict[str, dict[str, str]] = {}
    for warning in _laws_together(found):
        unique.setdefault(warning["text"], warning)
    told = sorted(_without_echoes(list(unique.values())), key=lambda w: LEVELS.index(w["level"]))
    shown = 0
    out: list[dict[str, Any]] = []
    for warning in told:
        main = warning["level"] == "bad" or (
            warning["level"] == "warn" and not SECTION.match(warning["text"]) and shown < MOST_SHOWN
        )
        shown += main
        out.append({**warning, "lesser": not main})
    return sorted(out, key=lambda w: w["lesser"])


def _laws_together(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """All that is said of one setting's law in one warning, its status first."""
    groups: dict[str, list[str]] = {}
    rest = []
    for warning in found:
        title = next((t for t in SETTING_TITLES.values() if warning["text"].startswith(f"{t}: ")), None)
        if title is None or warning["level"] != "warn":
            rest.append(warning)
        else:
            groups.setdefault(title, []).append(warning["text"].removeprefix(f"{title}: ").rstrip("."))
    joined = [f"{title}: {'; '.join(sorted(dict.fromkeys(texts), key=_is_detail))}." for title, texts in groups.items()]
    return rest + [{"level": "warn", "text": text} for text in joined]


def _is_detail(text: str) -> bool:
    return not text.startswith(STATUSES)


def _without_echoes(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """A prediction repeats in short what the fits said at length: the long form stays, at the place of the short one."""
    out = list(found)
    for short, long in ECHOES:
        first = next((i for i, w in enumerate(out) if short in w["text"]), None)
        second = next((i for i, w in enumerate(out) if w["text"].startswith(long)), None)
        if first is not None and second is not None and first != second:
            out[first] = {**out[first], "text": out[second]["text"]}
            del out[second]
    return out


def _fitted_to(table: RunTable, laws_hash: str) -> bool:
    """Whether the laws come from this table, or from it before its production and promotion runs, which enter no law."""
    purposes = [set(p.split(",")) for p in table.frame["purpose"]]
    for later in ((), ("production",), ("production", "promotion")):
        earlier = table.frame[[not p & set(later) for p in purposes]]
        if replace(table, frame=earlier).hash == laws_hash:
            return True
    return False


def _budgets_together(warnings: list[Any]) -> list[Any]:
    """Budgets with the same mark in one line: nine lines about nine budgets would hide the rest."""
    groups: dict[str, list[tuple[str, str]]] = {}
    rest = []
    for warning in warnings:
        found = BUDGET.match(warning) if isinstance(warning, str) else None
        if found:
            groups.setdefault(found["status"], []).append((found["budget"], found["message"]))
        else:
            rest.append(warning)
    merged = []
    for status, members in groups.items():
        names = fmt.join([fmt.scientific(float(budget)) for budget, _ in members])
        message = members[0][1] if len({m for _, m in members}) == 1 else STATUS_ADVICE.get(status, members[0][1])
        merged.append(f"{'budget' if len(members) == 1 else 'budgets'} {names} FLOPs ({status}): {message}")
    return merged + rest


def as_warning(value: Any) -> dict[str, str]:
    """A warning of the laws file: a text, or {"level"?, "text"|"message"}."""
    if isinstance(value, Mapping):
        level = str(value.get("level", "warn"))
        return {"level": level if level in LEVELS else "warn", "text": sentence(value.get("text") or value.get("message") or "")}
    text = sentence(value)
    return {"level": "note" if LEFT_OUT.match(text) else "warn", "text": text}


def sentence(value: Any) -> str:
    """Starts with a capital letter (unless it starts with a symbol's name) and ends with a stop."""
    text = EXPONENT_FORM.sub(lambda m: fmt.scientific(float(m.group())), str(value).strip())
    head = text[:1].upper() + text[1:] if text[:2].islower() else text
    return head if head.endswith((".", "!", "?")) else head + "."
