"""A sweep over sizes and budgets that chooses its next cells: where they shrink the target's interval most per FLOP.

The sweep's own cells come first (two low budgets will do). Then, in rounds: fit the surface to what is recorded, ask
`analysis.design` how much to spend (`round_flops`) and on which runs (`suggest_runs`), write the choice down, run it: every
budget is centred on the law fitted so far. The choices lie in sweeps/<name>/choices.json: a sweep that is started again takes
them as they were made.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat_model.config import GPTConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.identity import from_dict, write_atomic
from nanochat_model.record import RunRecord
from nanoladder.execute import execute_sweep
from nanoladder.facts_file import SCHEMA_VERSION, read_facts
from nanoladder.sweep import Cell, Sweep
from nanoladder.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

CHOICES_FILE = "choices.json"
REST_SHARE = 0.02  # of all FLOPs: what is left then is too little for another round
MIN_RUNS = 6  # for a surface of five parameters
STEP = math.sqrt(10.0)  # to the next budget where no surface can be fitted yet
STEP_SIZES = 5

Say = Callable[[str], None]
Run = Callable[..., list[RunRecord]]


def execute_adaptive(
    sweep: Sweep, workspace: Workspace, *, say: Say = lambda text: None, run: Run = execute_sweep, **options: Any
) -> list[RunRecord]:
    """Run the sweep's cells and then its rounds, until `sweep.adaptive.total_flops` are spent; every record.

    `run` runs a sweep whole; `options` are passed on to it. Raises ConfigError where the runs so far show no shape to choose by,
    and where no run of a round completed.
    """
    from analysis.design import round_flops

    plan = sweep.adaptive
    assert plan is not None, f"sweep {sweep.name} has no `adaptive`"
    path = workspace.sweep_dir(sweep.name) / CHOICES_FILE
    rounds = read_choices(path)
    completed = -1
    while True:
        grown = with_choices(sweep, rounds)
        records = run(grown, workspace, **options)
        done = [r for r in records if r.status == "complete"]
        if len(done) == completed:
            raise ConfigError(f"sweep {sweep.name}: no run of round {len(rounds)} completed; see its records before it goes on")
        completed = len(done)
        spent = sum(r.train_flops for r in done)
        left = plan.total_flops - spent
        choice = choose(grown, done, round_flops(spent, left)) if left > REST_SHARE * plan.total_flops else None
        if choice is None:
            if left > 0:
                say(f"{left:.3g} of {plan.total_flops:.3g} FLOPs are left, too few for a round that tells more")
            return records
        rounds.append({"round": len(rounds) + 1, "spent_flops": spent, **choice})
        write_atomic(path, json.dumps({"schema_version": SCHEMA_VERSION, "sweep": sweep.name, "rounds": rounds}, indent=1))
        say(f"round {len(rounds)}: {choice['message']}")


def read_choices(path: Path) -> list[dict[str, Any]]:
    """The rounds that were chosen before; ConfigError where the file is broken."""
    if not path.exists():
        return []
    return list(read_facts(path, "choices", "remove it, and start again (records stay, choices are made anew)")["rounds"])


def with_choices(sweep: Sweep, rounds: Sequence[dict[str, Any]]) -> Sweep:
    """The sweep with the cells of all rounds added."""
    cells = [
        Cell(
            model=from_dict(GPTConfig, c["model"], "choice: "),
            horizon=Horizon(train_flops=c["train_flops"]),
            name=c["cell"],
            overrides={"seed": c["seed"]} if c.get("seed") is not None else {},
        )
        for each in rounds
        for c in each["cells"]
    ]
    return replace(sweep, cells=(*sweep.cells, *cells))


def choose(sweep: Sweep, records: Sequence[RunRecord], flops: float) -> dict[str, Any] | None:
    """The next round for `flops`: its cells, and why; None when nothing that can be afforded helps."""
    from analysis.design import suggest_runs
    from analysis.errors import DataError

    plan = sweep.adaptive
    assert plan is not None
    frame = run_table(records)
    sizes = {float(count_params(m).scaling): m for m in plan.models}
    surface = fitted_surface(frame)
    if surface is None:
        return _step_up(sweep, frame, sizes, flops)
    try:
        design = suggest_runs(
            frame,
            surface,
            target_flops=plan.target_flops,
            remaining_flops=flops,
            quantity=plan.quantity,
            noise_sd=seed_noise(records),
            sizes=sorted(sizes),
        )
    except DataError:
        return None  # no size fits into what is left
    cells = _new_cells(sweep, [(sizes[r.N], r.C) for r in design.runs])
    facts = {"surface": dict(surface), "quantity": plan.quantity, "sd_before": design.sd_before, "sd_after": design.sd_after}
    return {**facts, "message": design.message, "cells": cells} if cells else None


def run_table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """N (matrices + lm_head), D, C and loss of the runs."""
    import pandas as pd

    rows = [(float(r.params["scaling"]), float(r.num_tokens), r.train_flops, r.val_bpb) for r in records if r.val_bpb]
    return pd.DataFrame(rows, columns=["N", "D", "C", "L"])


def fitted_surface(frame: pd.DataFrame) -> dict[str, float] | None:
    """E, A, B, alpha, beta by log least squares; None where the runs do not show both terms."""
    from analysis.allocation.parametric import fit_parametric

    if len(frame) < MIN_RUNS:
        return None
    fit = fit_parametric(frame["N"].to_numpy(), frame["D"].to_numpy(), frame["L"].to_numpy(), delta=math.inf)
    found = {"E": fit.E, "A": fit.A, "B": fit.B, "alpha": fit.alpha, "beta": fit.beta}
    usable = fit.status in ("converged", "not_identifiable") and all(math.isfinite(v) and v > 0 for v in found.values())
    return {k: float(v) for k, v in found.items()} if usable else None


def seed_noise(records: Sequence[RunRecord]) -> float | None:
    """Relative noise between seeds of one cell; None where no cell was run by several."""
    cells: dict[str, list[float]] = {}
    for r in records:
        if r.val_bpb:
            cells.setdefault(json.dumps([r.params["scaling"], r.num_tokens]), []).append(math.log(r.val_bpb))
    many = [v for v in cells.values() if len(v) > 1]
    df = sum(len(v) - 1 for v in many)
    return math.sqrt(sum(float(np.var(v)) * len(v) for v in many) / df) if df else None


def _step_up(sweep: Sweep, frame: pd.DataFrame, sizes: dict[float, GPTConfig], flops: float) -> dict[str, Any] | None:
    """Without a surface: the next budget, centred on the best run of the largest so far with N* ~ sqrt(C)."""
    if frame.empty:
        raise ConfigError(f"sweep {sweep.name}: no run completed, so there is nothing to choose the next ones by; see its records")
    top = float(frame["C"].max())
    best = frame[frame["C"] > top / 1.3].sort_values("L").iloc[0]
    budget = min(top * STEP, flops / 2)
    centre = float(best["N"]) * math.sqrt(budget / top)
    near = sorted(sizes, key=lambda n: abs(math.log(n / centre)))[: max(2, min(STEP_SIZES, int(flops / budget)))]
    cells = _new_cells(sweep, [(sizes[n], budget) for n in sorted(near)])
    message = f"no surface can be fitted to {len(frame)} runs yet: {len(cells)} sizes at {budget:.3g} FLOPs about the best so far"
    return {"surface": None, "message": message, "cells": cells} if cells else None


def _new_cells(sweep: Sweep, wanted: Sequence[tuple[GPTConfig, float]]) -> list[dict[str, Any]]:
    """Cells to add. One that the sweep has already is run by a further seed: the design counts on an independent run."""
    times = Counter(replace(c, name="").label for c in sweep.cells)
    cells = []
    for model, budget in wanted:
        if budget <= flops_per_token(model) * model.sequence_len:
            continue  # not one row of tokens
        label = Cell(model=model, horizon=Horizon(train_flops=budget)).label
        cell: dict[str, Any] = {"cell": label, "model": asdict(model), "train_flops": budget}
        if times[label]:
            seed = max(sweep.seeds) + times[label]
            cell |= {"cell": f"{label}-s{seed}", "seed": seed}
        times[label] += 1
        cells.append(cell)
    return cells
