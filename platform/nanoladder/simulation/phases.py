"""What a sweep or ladder runs, stage by stage, decided by the code that decides it in earnest.

Losses are assumed (nothing is trained): they only say which candidates go on and whether a range grows. Pool, order of
candidates, growth of grids, screening, promotion and rounds of an adaptive sweep are the real ones.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nanochat_model.config import DataConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash
from nanochat_model.record import CurvePoint, RunRecord
from nanoladder.adaptive import execute_adaptive
from nanoladder.candidates import fixed_candidates, num_awaited
from nanoladder.cells import VARIANT, Trial, make_trial, planned_trials
from nanoladder.ladder import Ladder, RunsByVariant, final_of, finalists, moved, winners
from nanoladder.pool import CellWork, make_works, trial_flops, trial_tags
from nanoladder.promote import Promotion
from nanoladder.space import Choice, Grid, LogUniform, Space, Uniform, Value, is_active, plain
from nanoladder.study import Candidate, Outcome, study_name
from nanoladder.sweep import ADAPTIVE, BASELINE, Cell, Sweep
from nanoladder.workspace import Workspace

Edges = Literal["inside", "outside"]
# Hoffmann et al., arXiv 2203.15556: E, A, B, alpha, beta. An adaptive sweep needs some surface to choose by.
SURFACE = (1.69, 406.4, 410.7, 0.34, 0.28)
SEED_NOISE = 0.003  # of a loss's logarithm, so that a surface can be fitted to runs that are not exactly on it


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """How a sweep turns out."""

    edges: Edges = "inside"  # the best value lies inside its range, or outside: then ranges grow as often as they may
    winners: int = -1  # candidates that a ladder's stage adopts; −1: all that it tried

    def __post_init__(self) -> None:
        if self.edges not in ("inside", "outside"):
            raise ConfigError(f'edges {self.edges!r} must be "inside" (the best value lies in its range) or "outside"')
        if self.winners < -1:
            raise ConfigError(f"winners {self.winners} must be 0 or more candidates of a stage, or -1 for all")


class PlannedStudy:
    """The candidates of a cell, without Optuna. Those of a sampler that learns are drawn at random from its space."""

    def __init__(self, sweep: Sweep, cell: Cell, data: DataConfig | None) -> None:
        self.space: Space = {VARIANT: Choice(sweep.variants)} if sweep.variants else sweep.space_of(cell)
        self.candidates: list[Candidate] = []
        self._sweep, self._cell = sweep, cell
        self._sampler = sweep.sampler_of(cell)
        self._name = study_name(sweep, cell, data)
        self._values = self._drawn(sweep, self.space)

    def _drawn(self, sweep: Sweep, space: Space) -> list[dict[str, Value]]:
        sampler = "random" if self._sampler in ADAPTIVE else self._sampler
        values = fixed_candidates(sweep, self._cell, space, sampler, self._name)
        assert values is not None
        return values

    def fresh(self) -> PlannedStudy:
        """The same study before its first candidate was asked for."""
        other = object.__new__(PlannedStudy)
        other.__dict__ |= {**self.__dict__, "candidates": [], "_values": list(self._values)}
        return other

    @property
    def total(self) -> int:
        return len(self._values)

    @property
    def exhausted(self) -> bool:
        return len(self.candidates) >= self.total

    def next_candidate(self) -> Candidate | None:
        number = len(self.candidates)
        awaited = self.candidates[: num_awaited(self._sampler, number, self._sweep.parallel_trials)]
        if self.exhausted or any(c.outcome is None for c in awaited):
            return None
        self.candidates.append(Candidate(number=number, values=dict(self._values[number]), trial_number=number))
        return self.candidates[-1]

    def finish(
        self, number: int, outcome: Outcome, values: Sequence[float] | None, curve: Sequence[CurvePoint] = (), **attrs: Any
    ) -> None:
        self.candidates[number].outcome = outcome

    def extend(self, values: Sequence[Mapping[str, Value]]) -> None:
        self._values += [dict(v) for v in values if dict(v) not in self._values]

    def widen(self, ranges: Mapping[str, Uniform | LogUniform], more_trials: int) -> None:
        wider = replace(self._sweep, num_trials=self._sweep.num_trials + more_trials)
        self._values += self._drawn(wider, {**self.space, **ranges})[len(self._values) :]

    def describe(self) -> dict[str, Any]:
        return {"study": self._name}

    def release(self) -> None:
        """No database holds anything of it."""


@dataclass
class Phase:
    """A sweep that a command runs to its end before the next."""

    sweep: Sweep
    data: DataConfig | None
    edges: Edges
    _works: list[CellWork] = field(default_factory=list)
    _trials: dict[tuple[str, int, int], Trial] = field(default_factory=dict)
    _records: dict[str, RunRecord] = field(default_factory=dict)

    def works(self) -> list[CellWork]:
        """Its cells before the first candidate, with what is costly to find worked out once."""
        if not self._works:
            self._works = make_works(self.sweep, PlannedStudy, self.data)
        fresh = [(w, w.study.fresh()) for w in self._works if isinstance(w.study, PlannedStudy)]
        return [CellWork(sweep=w.sweep, cell=w.cell, study=s, data=w.data, flops_per_trial=w.flops_per_trial) for w, s in fresh]

    def make(
        self, sweep: Sweep, cell: Cell, candidate: int, values: Mapping[str, Value], seed: int, data: DataConfig | None
    ) -> Trial:
        key = (cell.label, candidate, seed)
        if key not in self._trials:
            self._trials[key] = make_trial(sweep, cell, candidate, values, seed, data)
        return self._trials[key]

    def record(self, trial: Trial) -> RunRecord:
        if trial.run_id not in self._records:
            self._records[trial.run_id] = assumed_record(self.sweep, trial, self.edges)
        return self._records[trial.run_id]


def phases(target: Sweep | Ladder, assumed: Assumed, data_of: Mapping[str, DataConfig | None]) -> list[Phase]:
    """The sweeps of a command in their order. `data_of`: sweep or stage name -> its shards, where known."""
    if isinstance(target, Ladder):
        sweeps = _ladder_sweeps(target, assumed)
    elif target.adaptive is not None:
        sweeps = _rounds(target)
    else:
        sweeps = [target]
    return [Phase(s, data_of.get(s.name.removesuffix("/screen")), assumed.edges) for s in sweeps]


def _ladder_sweeps(ladder: Ladder, assumed: Assumed) -> list[Sweep]:
    sweeps: list[Sweep] = []

    def run(sweep: Sweep) -> RunsByVariant:
        sweeps.append(sweep)
        found: RunsByVariant = {name: {} for name in sweep.variants}
        for trial in planned_trials(sweep):
            runs = found[str(trial.values[VARIANT])]
            runs[len(runs)] = assumed_record(sweep, trial)
        return found

    variants: Mapping[str, Mapping[str, Any]] = ladder.variants
    for stage in ladder.stages:
        sweep = ladder.stage_sweep(stage, variants)
        final = final_of(sweep, finalists(sweep, stage.finalists, run))
        sweeps.append(final)
        names = [name for name in final.variants if name != BASELINE]
        adopted = names if assumed.winners < 0 else names[: assumed.winners]
        gains = {name: -math.log(_variant_loss(final, name)) for name in adopted}
        judged = [Promotion(change=n, overrides={}, stage=stage.name, verdict="adopt", gain=g) for n, g in gains.items()]
        variants = moved(winners(judged, sweep.variants, combine=ladder.combine), sweep)
        if not variants:
            break
    return sweeps


def _rounds(sweep: Sweep) -> list[Sweep]:
    """An adaptive sweep as it grows, on a published surface."""
    sweeps: list[Sweep] = []

    def run(grown: Sweep, workspace: Workspace, **options: Any) -> list[RunRecord]:
        sweeps.append(grown)
        return [assumed_record(grown, trial) for trial in planned_trials(grown)]

    with tempfile.TemporaryDirectory(prefix="nanoladder-simulate-") as folder:
        execute_adaptive(sweep, Workspace(folder), run=run)
    return sweeps


# --- how runs turn out ---


def assumed_record(sweep: Sweep, trial: Trial, edges: Edges = "inside") -> RunRecord:
    """The record of a run that completed as assumed."""
    flops = trial_flops(trial)
    return RunRecord(
        run_id=trial.run_id,
        status="complete",
        name=trial.name,
        sweep=trial.sweep,
        stage=trial.stage,
        tags=trial_tags(trial),
        config=trial.config,
        seed=trial.seed,
        params={"scaling": count_params(trial.config.model).scaling} if sweep.adaptive is not None else {},
        num_tokens=trial.config.num_tokens,
        flops_per_token=flops_per_token(trial.config.model),
        train_flops=flops,
        val_bpb=_loss(sweep, trial, edges),
        core=1.0 / _loss(sweep, trial, edges),
        train_seconds=1.0,
    )


def _loss(sweep: Sweep, trial: Trial, edges: Edges) -> float:
    if sweep.adaptive is not None:
        n, d = float(count_params(trial.config.model).scaling), float(trial.config.num_tokens)
        e, a, b, alpha, beta = SURFACE
        noise = math.sin(int(content_hash(trial.run_id)[:8], 16))
        return (e + a / n**alpha + b / d**beta) * math.exp(SEED_NOISE * math.sqrt(2) * noise)
    if VARIANT in trial.values and sweep.variants:
        return _variant_loss(sweep, str(trial.values[VARIANT]))
    cell = next(c for c in sweep.cells if c.label == trial.cell)
    return math.exp(sum(_off(sweep.space_of(cell), k, v, edges, trial.values) for k, v in trial.values.items()))


def _variant_loss(sweep: Sweep, name: str) -> float:
    """The earlier a candidate is named, the more it gains; the baseline gains nothing."""
    names = list(sweep.variants)
    return 1.0 if name == BASELINE else 1.0 - 0.01 * (1 - names.index(name) / len(names))


def _off(space: Space, key: str, value: Value, edges: Edges, values: Mapping[str, Value]) -> float:
    """How far a value is from the best one: the middle of its dimension, or beyond its upper end."""
    ends = _ends(space, key)
    if ends is None or not is_active(space[key], values) or isinstance(value, str | bool):
        return 0.0
    low, high = ends
    log = low > 0
    at, low, high = (math.log(x) if log else float(x) for x in (float(value), low, high))
    share = (at - low) / (high - low)
    return 0.01 * (share - 0.5) ** 2 if edges == "inside" else -0.01 * share


def _ends(space: Space, key: str) -> tuple[float, float] | None:
    dimension = plain(space[key])
    if isinstance(dimension, Uniform | LogUniform):
        return dimension.low, dimension.high
    if isinstance(dimension, Grid) and len(set(dimension.values)) > 1:
        return float(min(dimension.values)), float(max(dimension.values))
    return None
