"""What a reader should do next: at most one sentence a subject, those that move the recommendation most first. Reads facts only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from analysis.report import format as fmt
from analysis.report.verdict import SETTING_WORDS
from analysis.table import NO_CONVENTION

Facts = Mapping[str, Any]
ENOUGH_BUDGETS = 4  # fewer: no budget can be held out, so a prediction has no interval (docs/laws.md)
FAR = 10.0  # times the largest compute fitted, from which a prediction carries a caution
MANY_EDGES = 3  # budgets named one by one


def next_steps(facts: Facts) -> list[str]:
    """Sentences for facts["next_steps"]; the last one is always about the run that the laws are for."""
    return [*_budgets(facts), *_grids(facts), *_settings(facts), *_seeds(facts), _launch(facts)]


def _budgets(facts: Facts) -> Iterator[str]:
    """More compute budgets, where there are too few or they end too far below the target."""
    budgets = facts["budgets"]
    if len(budgets) < 2:
        yield "Train a ladder: four or more compute budgets, each with five or more model sizes around its best."
        return
    times = facts["prediction"].get("extrapolation")
    beyond = fmt.scientific(budgets[-1] ** 2 / budgets[-2], 2)  # as far above the last as that is above the one before
    if len(budgets) < ENOUGH_BUDGETS:
        yield (
            f"Add a budget of about {beyond} FLOPs: with {ENOUGH_BUDGETS} or more, predictions can be tested against a budget held "
            "out, and get an interval."
        )
    elif fmt.is_number(times) and times > FAR:
        yield (
            f"Add a budget of about {beyond} FLOPs: the target lies {fmt.significant(times, 2)} times beyond the largest, and "
            "every budget nearer to it narrows the interval."
        )


def _grids(facts: Facts) -> Iterator[str]:
    """Sizes to add where a budget's minimum is not inside its grid."""
    open_ends = [b for b in facts["isoflop"].get("budgets") or [] if b.get("status") != "interior"]
    if len(open_ends) > MANY_EDGES:
        yield f"Widen the grids of sizes: {len(open_ends)} budgets have no clear minimum inside theirs (see the table below)."
        return
    for b in open_ends:
        what = {"low": "smaller sizes", "high": "larger sizes"}.get(str(b.get("side")), "sizes on both sides, further apart")
        yield f"At {fmt.scientific(b['C'], 2)} FLOPs add {what}: the minimum is not clearly inside the grid."


def _settings(facts: Facts) -> Iterator[str]:
    """Batch, learning rate and weight decay: sweeps that are missing, and what those that are there lack."""
    absent = [word for name, word in SETTING_WORDS.items() if facts[name].get("missing")]
    for name, word in SETTING_WORDS.items():
        block = facts[name]
        if block.get("missing") or block["status"] == "converged":
            continue
        edges = {c.get("edge") for c in block["cells"]} & {"low", "high"}
        separating = [str(run["what"]) for run in block.get("separating_runs") or []]
        if separating:
            yield f"For the {word}: {'; or '.join(separating)}."
        elif block["status"] == "at_bound" and edges:
            yield f"Extend the grids of the {word} on the {fmt.join(sorted(edges))} side: most optima lie at their edge."
        else:
            yield (
                f"Sweep the {word} in more cells, of other sizes and horizons, and in wider steps: "
                f"{fmt.plural(len(block['cells']), 'cell')} {'carries' if len(block['cells']) == 1 else 'carry'} no law."
            )
    if absent:
        yield f"Sweep the {fmt.join(absent)} in three or more (N, D) cells, or stay with the recipe's own rules for now."


def _seeds(facts: Facts) -> Iterator[str]:
    if facts["noise"].get("missing"):
        yield "Train one middle cell with three seeds: until then no difference between two runs can be told from noise."


def _launch(facts: Facts) -> str:
    production = facts["production"]
    if fmt.is_number(production.get("error")):
        if production.get("inside"):
            return "The production run kept the prediction: add it to the evidence and plan a larger one with `nanoladder plan`."
        if production.get("inside") is False:
            return "The production run left its interval: find out why (data, packing, a spike in its curve) before a larger one."
    if facts["verdict"]["status"] == "refuse":
        return "Do not start a large run on these laws yet: `nanoladder plan` without --laws goes by the recipe's own rules."
    compute = facts["prediction"].get("C")
    flops = f" --flops {compute:.3g}" if fmt.is_number(compute) else ""
    plan = f"`nanoladder plan --laws laws.json{flops}` with your --device, --num-devices and --price"
    if facts["convention"] == NO_CONVENTION:
        return (
            "To plan a run by these laws, fit again and say what N counts: --params-all, --params-matrices-lm-head or "
            f"--params-matrices with your column in place of --params; then {plan}."
        )
    return f"Then plan the run: {plan}."
