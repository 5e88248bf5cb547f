"""Facts about batch size, learning rate and weight decay: from a Law to words, a line to draw, and a value at the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.law import Law
from analysis.report import format as fmt
from analysis.weight_decay import WeightDecayLaw

PUBLISHED = {  # slopes only: constants depend on data and model
    "batch_size": [
        {"label": "arXiv 2505.13738: D<sup>0.383</sup>", "exponent": 0.383},
        {"label": "Step Law: D<sup>0.571</sup>", "exponent": 0.571},
    ],
}
MISSING = {
    "batch_size": "No batch sweep in these runs: no cell trains one size on one horizon with several batches.",
    "learning_rate": "No learning-rate sweep in these runs: no cell tries several rates at one size and horizon.",
    "weight_decay": "No weight-decay sweep in these runs: no cell tries several decays at one size and horizon.",
}
SYMBOL_WORDS = {"N": "parameters", "D": "tokens", "width": "width", "B": "batch", "lr": "learning rate"}
STATUS_WORDS = {
    "at_bound": "most optima lie at an edge of their grid",
    "not_identifiable": "not identifiable",
    "too_few": "too few cells",
}
LAW_CAPTION = "The law through the cells' optima, with its 90% band."
DRAWN_FACTOR = 1.25  # the line is drawn this far beyond the cells
MOST_DRAWN = 400  # points of one cell's sweep in a figure


def setting_facts(raw: Mapping[str, Any], prediction: Mapping[str, Any], width: float | None) -> dict[str, dict[str, Any]]:
    """The three settings' blocks from the laws' dicts. The recommended batch and rate enter the decay's prediction.

    `prediction` holds the target's N and D; `width` the model dimension expected there.
    """
    given = {"N": prediction.get("N"), "D": prediction.get("D"), "width": width}
    at = {symbol: float(value) for symbol, value in given.items() if fmt.is_number(value)}
    batch = _power_law("batch_size", raw.get("batch_size"), at)
    rate = _power_law("learning_rate", raw.get("learning_rate"), at)
    for symbol, block in (("B", batch), ("lr", rate)):
        value = (block.get("target") or {}).get("value")
        if fmt.is_number(value):
            at[symbol] = float(value)
    return {"batch_size": batch, "learning_rate": rate, "weight_decay": _decay(raw.get("weight_decay"), at)}


def _power_law(name: str, raw: Mapping[str, Any] | None, at: Mapping[str, float]) -> dict[str, Any]:
    """Batch size or learning rate: one Law."""
    law = Law.from_dict(raw) if raw else None
    if law is None or not law.cells:
        return {"missing": MISSING[name]}
    cells = _sorted(law.cells)
    block = _common(law.status, law.message, cells) | {"form": law.form, "n": law.n, "method": law.method, "tests": law.tests}
    block["parameters"], block["intervals"] = dict(law.parameters), {k: list(v) if v else None for k, v in law.intervals.items()}
    what = "The best batch" if name == "batch_size" else "The best learning rate of the matrices"
    if not law.usable:
        block["text"] = f"{what} cannot be given: {law.message or law.status}; {_cells_text(cells)}."
        block["target"] = {"note": f"no law: {law.message or law.status}"}
        return block
    words = [f"{what} goes as {exponent_text(law)}", _cells_text(cells), *_tests_text(law)]
    if law.message and law.status != "converged":
        words.append(law.message)
    block |= {"text": "; ".join(words) + ".", "laws": [law_block(law, name, cells, at)], "target": at_target(law, at)}
    if (block["laws"][0].get("line") or {}).get("follows"):
        block["law_captions"] = [f"{LAW_CAPTION} N differs from cell to cell, so the line bends where the sizes do."]
    return block


def _tests_text(law: Law) -> list[str]:
    words = []
    term = law.tests.get("N_term")
    if term:
        words.append(
            f"a further term in N is {'' if term['significant'] else 'not '}significant (p {fmt.significant(term['p_value'], 2)})"
        )
    argmin = law.tests.get("argmin")
    if argmin:
        words.append(f"through the cells' best single runs the exponent would be {fmt.exponent(argmin['exponent'])}")
    return words


def _decay(raw: Mapping[str, Any] | None, at: Mapping[str, float]) -> dict[str, Any]:
    """Weight decay: candidates for what it follows, their average, and whether the runs can tell them apart."""
    decay = WeightDecayLaw.from_dict(raw) if raw else None
    if decay is None or not decay.cells:
        return {"missing": MISSING["weight_decay"]}
    cells = _sorted(decay.cells)
    usable = [law for law in decay.candidates if law.usable]
    block = _common(decay.status, decay.message, cells) | {"n": decay.n, "selected": decay.selected, "verdict": decay.verdict}
    block |= {"correlations": dict(decay.correlations), "separating_runs": [dict(r) for r in decay.separating_runs]}
    block["text"] = f"{decay.verdict[:1].upper()}{decay.verdict[1:]}; {_cells_text(cells)}." + _separating_text(decay)
    block["laws"] = [law_block(law, "weight_decay", cells, at) for law in usable]
    block["candidates"] = [_candidate(law, decay, at) for law in usable]
    block["law_captions"] = [f"Candidate {c['label']}: {c['exponent_text']}." for c in block["candidates"]]
    average = decay.average
    if average is not None and set(average.exponents) <= set(at):
        found = decay.predict(**{s: at[s] for s in at})
        block["target"] = {"value": found.value, "low": found.low, "high": found.high, "extrapolation": found.extrapolation}
        if len(average.tests.get("of") or []) > 1:
            block["average_text"] = f"{fmt.significant(found.value)} ({fmt.interval(found.low, found.high, fmt.significant)})"
    elif average is not None:
        absent = [SYMBOL_WORDS.get(s, s) for s in average.exponents if s not in at]
        block["target"] = {"note": f"the target's {fmt.join(absent)} {'is' if len(absent) == 1 else 'are'} not known"}
    return block


def _candidate(law: Law, decay: WeightDecayLaw, at: Mapping[str, float]) -> dict[str, Any]:
    error = decay.leave_one_scale_out.get(law.name)
    found = at_target(law, at)
    rho = law.parameters.get("rho")
    text = exponent_text(law)
    if rho is not None:
        interval = law.intervals.get("rho")
        note = fmt.interval(interval[0], interval[1], fmt.exponent) if interval else "published, not fitted"
        text = f"tau ∝ (D/N)^{fmt.exponent(rho)} ({note})"
    told = (
        f"{fmt.significant(found['value'])} ({fmt.interval(found['low'], found['high'], fmt.significant)})"
        if found
        else fmt.MISSING
    )
    return {
        "label": law.name,
        "form": law.form,
        "exponent_text": text,
        "error": error,
        "error_text": fmt.percent(math.exp(error) - 1) if fmt.is_number(error) else None,
        "prediction": found,
        "prediction_text": told,
        "status": law.status,
        "message": law.message,
    }


def _separating_text(decay: WeightDecayLaw) -> str:
    what = [str(run["what"]) for run in decay.separating_runs]
    return f" To tell them apart: {'; or '.join(what)}." if what else ""


def _common(status: str, message: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What every setting's block has; `doubt` is what the verdict calls unsettled."""
    short = message.split(";")[0].removeprefix("not identifiable: ")
    doubt = None if status == "converged" else short or STATUS_WORDS.get(status, status)
    return {"status": status, "message": message, "cells": [_thin(c) for c in cells], "doubt": doubt}


def _sorted(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return sorted((dict(c) for c in cells), key=lambda c: (c.get("D") or 0.0, c.get("N") or 0.0))


def _thin(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with at most MOST_DRAWN points: the best, and an even choice of the rest."""
    n = len(cell.get("x") or [])
    if n <= MOST_DRAWN:
        return cell
    order = np.argsort(cell["loss"])
    keep = sorted({int(order[0]), *(int(i) for i in np.linspace(0, n - 1, MOST_DRAWN - 1))})
    lists = {k: [cell[k][i] for i in keep] for k in ("x", "loss", "run_ids") if len(cell.get(k) or []) == n}
    return {**cell, **lists, "n_drawn": len(keep)}


def law_block(law: Law, name: str, cells: Sequence[Mapping[str, Any]], symbols: Mapping[str, float]) -> dict[str, Any]:
    """What law_figure draws: the law along its main symbol with its band, the cells, the value at the target."""
    symbol = main_symbol(law)
    target = at_target(law, symbols)
    ends = [float(c[symbol]) for c in cells if fmt.is_number(c.get(symbol))]
    if target and symbol in symbols:
        ends.append(symbols[symbol])
    block: dict[str, Any] = {"symbol": symbol, "cells": [_thin(dict(c)) for c in cells], "published": PUBLISHED.get(name, [])}
    if target:
        block["target"] = {**target, **{symbol: symbols.get(symbol)}}
    if ends:
        places = [*cells, symbols] if target else cells
        block["line"] = _line(law, symbol, min(ends) / DRAWN_FACTOR, max(ends) * DRAWN_FACTOR, places)
    return block


def main_symbol(law: Law) -> str:
    """The one the law is drawn against: its first fitted symbol, else its first."""
    if "rho" in law.parameters:
        return "D"  # the timescale law has four symbols; tokens are what it is mostly about
    return next(iter([*law.free, *law.exponents]), "D")


def _line(law: Law, symbol: str, low: float, high: float, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The law over low..high of `symbol`; other symbols go from cell to cell (and on to the target), straight in logarithms."""
    x = np.geomspace(low, high, 24)
    others = {s: _follow(s, symbol, x, cells, law.references.get(s, 1.0)) for s in law.exponents if s != symbol}
    found = [law.predict(**{symbol: float(v)}, **{s: float(values[i]) for s, values in others.items()}) for i, v in enumerate(x)]
    known = all(p.low is not None for p in found)
    return {
        "symbol": symbol,
        "x": x.tolist(),
        "y": [p.value for p in found],
        "low": [p.low for p in found] if known else None,
        "high": [p.high for p in found] if known else None,
        "follows": sorted(others),
    }


def _follow(other: str, symbol: str, x: np.ndarray, cells: Sequence[Mapping[str, Any]], fallback: float) -> np.ndarray:
    pairs = [(c[symbol], c[other]) for c in cells if fmt.is_number(c.get(symbol)) and fmt.is_number(c.get(other))]
    if not pairs:
        return np.full(len(x), fallback)
    logs = np.log(np.array(pairs, dtype=float))
    at, inverse = np.unique(np.round(logs[:, 0], 9), return_inverse=True)
    means = np.bincount(inverse.ravel(), weights=logs[:, 1]) / np.bincount(inverse.ravel())
    slope = float(np.polyfit(at, means, 1)[0]) if len(at) > 1 else 0.0
    beyond = np.minimum(np.log(x) - at[0], 0.0) + np.maximum(np.log(x) - at[-1], 0.0)
    return np.exp(np.interp(np.log(x), at, means) + slope * beyond)


def at_target(law: Law, symbols: Mapping[str, float]) -> dict[str, Any] | None:
    """{"value", "low", "high", "extrapolation"} where every symbol of the law is known at the target."""
    if not law.usable or not set(law.exponents) <= set(symbols):
        return None
    found = law.predict(**{s: symbols[s] for s in law.exponents})
    return {"value": found.value, "low": found.low, "high": found.high, "extrapolation": found.extrapolation}


def exponent_text(law: Law) -> str:
    """'D^0.46 (0.39 to 0.53)'; an exponent that was not fitted says so."""
    words = []
    for symbol, value in law.exponents.items():
        interval = law.intervals.get(symbol)
        if interval is not None:
            note = f" ({fmt.interval(interval[0], interval[1], fmt.exponent)})"
        else:
            note = "" if symbol in law.free else " (published, not fitted)"
        words.append(f"{symbol}^{fmt.exponent(value)}{note}")
    return fmt.join(words)


def _cells_text(cells: Sequence[Mapping[str, Any]]) -> str:
    inside = sum((c.get("edge") or "interior") == "interior" for c in cells)
    total = fmt.plural(len(cells), "cell")
    if inside == len(cells):
        return f"all {total} have their optimum inside their grid" if inside > 1 else "one cell, with its optimum inside its grid"
    if not inside:
        return "no cell has its optimum inside the grid" if len(cells) > 1 else "its one cell has no optimum inside the grid"
    return f"{inside} of {total} {'has its' if inside == 1 else 'have their'} optimum inside the grid, the others are bounds"
