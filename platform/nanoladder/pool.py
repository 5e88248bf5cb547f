"""Which run comes next, and what is known of each: the state of one or several sweeps, without Ray.

A run is named by its run_id. One that is recorded is not trained again; one that several sweeps (or cells) ask for is
trained once. A failed run is tried once more, in this command or the next, and no oftener in one command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from nanochat_model.config import DataConfig
from nanochat_model.counts import flops_per_token
from nanochat_model.record import CurvePoint, RunRecord
from nanoladder.cells import Trial, make_trial, resolve_config
from nanoladder.space import Dimension, LogUniform, Uniform, Value
from nanoladder.stopping import is_paused
from nanoladder.study import Candidate, Outcome
from nanoladder.sweep import Cell, Sweep

MAX_ATTEMPTS = 2  # of a run within one command
LISTED_TAGS = ("purpose", "sweeps")  # what several sweeps say of one record, comma-separated

MakeTrial = Callable[[Sweep, Cell, int, Mapping[str, Value], int, DataConfig | None], Trial]
Extender = Callable[["CellWork"], None]  # gives the study of a cell whose candidates are done further ones, where it needs them


class Study(Protocol):
    """What a pool asks of the study of a cell (`CellStudy`; in a simulation, candidates without Optuna)."""

    candidates: list[Candidate]

    @property
    def space(self) -> Mapping[str, Dimension]: ...

    @property
    def total(self) -> int: ...

    @property
    def exhausted(self) -> bool: ...

    def next_candidate(self) -> Candidate | None: ...

    def finish(
        self, number: int, outcome: Outcome, values: Sequence[float] | None, curve: Sequence[CurvePoint] = (), **attrs: Any
    ) -> None: ...

    def extend(self, values: Sequence[Mapping[str, Value]]) -> None: ...

    def widen(self, ranges: Mapping[str, Uniform | LogUniform], more_trials: int) -> None: ...

    def describe(self) -> dict[str, Any]: ...

    def release(self) -> None: ...


class Records(Protocol):
    """Where a pool finds and leaves records."""

    def load(self, run_id: str) -> RunRecord | None: ...

    def save(self, record: RunRecord) -> None: ...


class RecordFiles:
    """Records in the folders of their runs."""

    def __init__(self, runs_dir: Path) -> None:
        self._runs_dir = runs_dir

    def load(self, run_id: str) -> RunRecord | None:
        return load_record(self._runs_dir / run_id)

    def save(self, record: RunRecord) -> None:
        record.save(self._runs_dir / record.run_id)


@dataclass
class CellWork:
    """One cell of one sweep at work."""

    sweep: Sweep
    cell: Cell
    study: Study
    data: DataConfig | None
    flops_per_trial: float  # of its baseline
    records: dict[int, dict[int, RunRecord]] = field(default_factory=dict)  # candidate -> seed -> record
    values: dict[int, float | None] = field(default_factory=dict)  # candidate -> (first) metric; None: failed or pruned
    failing: dict[int, set[int]] = field(default_factory=dict)  # candidate -> seeds that failed, if only once
    dropped: int = 0  # runs of candidates that were given up

    def wanted_runs(self) -> int:
        return self.study.total * len(self.sweep.seeds) - self.dropped


@dataclass
class _Run:
    """A run that is ready or being trained, and everybody who waits for it."""

    trial: Trial
    waiting: list[tuple[CellWork, Trial]]
    tries: int = 0  # within this command
    earlier: int = 0  # attempts that earlier commands recorded as failed


class Pool:
    """Hands out runs (`next`) and takes their records (`finish`). Not safe for threads."""

    def __init__(
        self,
        works: Sequence[CellWork],
        runs: Path | Records,
        *,
        on_record: Callable[[Trial, RunRecord, bool], None] | None = None,
        extend: Extender | None = None,
        make: MakeTrial = make_trial,
    ) -> None:
        self._works = sorted(works, key=lambda w: -w.flops_per_trial)  # the longest first: no long tail on one device
        self._records: Records = RecordFiles(runs) if isinstance(runs, Path) else runs
        self._make = make
        self._on_record = on_record or (lambda trial, record, new: None)
        self._extend = extend
        self._ready: dict[str, _Run] = {}
        self.in_flight: dict[str, _Run] = {}
        self._paused: set[str] = set()
        for work in self._works:
            for candidate in list(work.study.candidates):
                self._open(work, candidate)

    # --- what the scheduler asks ---

    def next(self) -> Trial | None:
        """The next run to train; None while results must come in first, or when `done`."""
        while True:
            if self._ready:
                run_id = next(iter(self._ready))
                run = self._ready.pop(run_id)
                run.tries += 1
                self.in_flight[run_id] = run
                return run.trial
            if not self._open_one():
                return None

    @property
    def done(self) -> bool:
        return not self.in_flight and not self._ready and not self._paused and not self._open_one()

    def attempts(self, run_id: str) -> int:
        """Which attempt at this run is in flight, counted over all commands."""
        run = self.in_flight[run_id]
        return run.earlier + run.tries

    def finish(self, run_id: str, record: RunRecord) -> bool:
        """The record of a run in flight; whether it will be tried again."""
        run = self.in_flight.pop(run_id)
        again = record.status == "failed" and not self._hopeless(run) and run.tries + min(run.earlier, 1) < MAX_ATTEMPTS
        if again:
            self._ready[run_id] = run
            return True
        for i, (work, trial) in enumerate(run.waiting):
            record = self._share(record, trial) if record.status == "complete" else record
            self._resolve(work, trial, record, new=i == 0)
        return False

    def put_back(self, run_id: str) -> None:
        """A run in flight was paused: it is neither done nor ready, and a later command takes it up."""
        self._paused.add(run_id)
        del self.in_flight[run_id]

    def _hopeless(self, run: _Run) -> bool:
        """Whether, with this failure, so many seeds failed that nobody who waits for this run wants it tried again."""
        for work, trial in run.waiting:
            work.failing.setdefault(trial.candidate, set()).add(trial.seed)
        return all(0 < w.sweep.prune_failures <= len(w.failing[t.candidate]) for w, t in run.waiting)

    # --- opening candidates ---

    def _open_one(self) -> bool:
        for work in self._works:
            candidate = work.study.next_candidate()
            if candidate is not None:
                self._open(work, candidate)
                return True
        return False

    def _open(self, work: CellWork, candidate: Candidate) -> None:
        trials = [
            self._make(work.sweep, work.cell, candidate.number, candidate.values, seed, work.data) for seed in work.sweep.seeds
        ]
        for trial in trials:
            self._admit(work, trial)

    def _admit(self, work: CellWork, trial: Trial) -> None:
        running = self._ready.get(trial.run_id) or self.in_flight.get(trial.run_id)
        if running is not None:
            running.waiting.append((work, trial))
            return
        record = self._records.load(trial.run_id)
        if record is not None and record.status != "failed" and not is_paused(record):
            self._resolve(work, trial, self._share(record, trial), new=False)
            return
        self._ready[trial.run_id] = _Run(trial=trial, waiting=[(work, trial)], earlier=_failed_attempts(record))

    # --- results ---

    def _resolve(self, work: CellWork, trial: Trial, record: RunRecord, *, new: bool) -> None:
        seeds = work.records.setdefault(trial.candidate, {})
        seeds[trial.seed] = record
        self._on_record(trial, record, new)
        if trial.candidate in work.values:
            return  # given up while this run was in flight
        given_up = self._give_up(work, trial.candidate)
        if len(seeds) < len(work.sweep.seeds) and not given_up:
            return
        outcome, values = ("pruned", None) if given_up else judge(work.sweep, seeds.values())
        attrs: dict[str, Any] = {"runs": {str(seed): r.run_id for seed, r in seeds.items()}}
        for metric in work.sweep.metrics:
            attrs[metric] = {str(seed): metric_of(work.sweep, r, metric) for seed, r in seeds.items()}
        work.values[trial.candidate] = values[0] if values else None
        work.study.finish(trial.candidate, outcome, values, seeds[min(seeds)].curve, **attrs)
        if self._extend and work.sweep.extend_edges and work.study.exhausted and len(work.values) == work.study.total:
            self._extend(work)

    def _give_up(self, work: CellWork, candidate: int) -> bool:
        """Whether so many seeds of a candidate failed that its others are not run; those not yet started are dropped."""
        limit, seeds = work.sweep.prune_failures, work.records[candidate]
        if limit == 0 or len(work.failing.get(candidate, ())) < limit or len(seeds) == len(work.sweep.seeds):
            return False
        for run_id, run in list(self._ready.items()):
            if all(w is work and t.candidate == candidate for w, t in run.waiting):
                del self._ready[run_id]
                work.dropped += 1
        return True

    def _share(self, record: RunRecord, trial: Trial) -> RunRecord:
        """Add this sweep's purpose and name to the tags of a record that another sweep has made."""
        tags = merge_tags(record.tags, trial)
        if tags == record.tags:
            return record
        record = replace(record, tags=tags)
        self._records.save(record)
        return record


def metric_of(sweep: Sweep, record: RunRecord, metric: str = "") -> float | None:
    """The sweep's (first) metric of a record, or another."""
    value = getattr(record, metric or sweep.metric)
    return None if value is None else float(value)


def judge(sweep: Sweep, records: Iterable[RunRecord]) -> tuple[Outcome, tuple[float, ...] | None]:
    """What a candidate's runs amount to: complete, with the mean of each metric over seeds, only when every seed completed."""
    records = list(records)
    if any(r.status == "failed" for r in records):
        return "failed", None
    if any(r.status == "stopped" for r in records):
        return "pruned", None
    columns = [[metric_of(sweep, r, metric) for r in records] for metric in sweep.metrics]
    means = [fmean(v for v in column if v is not None) for column in columns if None not in column]
    return ("complete", tuple(means)) if len(means) == len(columns) else ("failed", None)


def merge_tags(tags: dict[str, str], trial: Trial) -> dict[str, str]:
    """The tags of a record with those of one more trial: lists grow, of the others the first sweep's stay."""
    merged = {**trial_tags(trial), **tags}
    for key in LISTED_TAGS:
        names = [n for n in (tags.get(key, ""), trial_tags(trial).get(key, "")) if n]
        unique = dict.fromkeys(part for n in names for part in n.split(","))
        if unique:
            merged[key] = ",".join(unique)
    return merged


def trial_tags(trial: Trial) -> dict[str, str]:
    return {**trial.tags, "sweeps": trial.sweep}


def _failed_attempts(record: RunRecord | None) -> int:
    """Attempts that an earlier command recorded as failed; a run that was paused goes on with the attempt it was at."""
    if record is None:
        return 0
    return max(1, record.attempts) if record.status == "failed" else record.attempts - 1


def load_record(run_dir: Path) -> RunRecord | None:
    """The record in a run's folder, None where there is none. A broken one is a ConfigError that names it."""
    if not (run_dir / "record.json").is_file():
        return None
    return RunRecord.load(run_dir)


def trial_flops(trial: Trial) -> float:
    return float(trial.config.num_tokens) * flops_per_token(trial.config.model)


def make_works(sweep: Sweep, studies: Callable[[Sweep, Cell, DataConfig | None], Study], data: DataConfig | None) -> list[CellWork]:
    """The cells of a sweep with their studies; `data` says which shards (None: unknown yet, for planning)."""
    works = []
    for cell in sweep.cells:
        config = resolve_config(sweep, cell, data=data)
        flops = float(config.num_tokens) * flops_per_token(config.model)
        works.append(CellWork(sweep=sweep, cell=cell, study=studies(sweep, cell, data), data=data, flops_per_trial=flops))
    return works
