"""One Optuna study a cell: what is tried next, and what Optuna is told.

Suggestions do not depend on timing. A sampler that learns gets its random state from the candidate's number, and suggestion
k sees the results up to k − parallel_trials, no more and no fewer; results that come in earlier wait. So a sweep that was
interrupted and started again asks for the same runs as one that was not.
"""

from __future__ import annotations

import math
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from nanochat_model.config import DataConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash, run_id
from nanochat_model.record import CurvePoint
from nanoladder.candidates import fixed_candidates, num_awaited
from nanoladder.cells import VARIANT, resolve_config
from nanoladder.run_lock import making_databases
from nanoladder.space import Choice, Dimension, Grid, LogUniform, Space, Times, Uniform, Value, When, is_active, plain
from nanoladder.study_writes import finish_trial
from nanoladder.sweep import ADAPTIVE, Cell, Sweep

Outcome = Literal["complete", "failed", "pruned"]
BUSY_SECONDS = 120.0  # how long a write waits for another process's
STARTUP_TRIALS = 10  # random candidates before TPE or GP learns: Optuna's default
MAX_INTERMEDIATE = 12  # points of a curve that Optuna keeps; each is a write
RETRY_OF = "retry_of"
WIDER = "wider_ranges"
_STATES: dict[Outcome, TrialState] = {
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}


@dataclass
class Candidate:
    """A point of the space in one cell. `outcome` is None until all its runs are done; `told` says Optuna knows."""

    number: int
    values: dict[str, Value]
    trial_number: int
    outcome: Outcome | None = None
    values_told: tuple[float, ...] = ()  # one an objective
    told: bool = False
    trial_id: int = -1  # in Optuna's storage
    adopted_finished: bool = False  # Optuna held it as finished when this command began
    curve: tuple[CurvePoint, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wider:
    """How far the ranges of a study have grown, and by how many trials."""

    ranges: Mapping[str, Uniform | LogUniform] = field(default_factory=dict)
    trials: int = 0


def open_storage(uri: str) -> optuna.storages.RDBStorage:
    """Optuna's storage at a database URI. A sqlite file waits for other writers (a dashboard) instead of failing, and does not
    wait for the disk: a commit then takes 1 ms in place of 20, and what a power cut may break is made again from the records.
    Raises ConfigError on a file that is no database of Optuna's.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not uri.startswith("sqlite:///"):
        return optuna.storages.RDBStorage(uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA journal_mode=TRUNCATE")
        return connection

    try:
        with making_databases(path.parent):
            return optuna.storages.RDBStorage(uri, engine_kwargs={"creator": connect})
    except (sqlalchemy.exc.DatabaseError, sqlite3.DatabaseError) as e:
        raise ConfigError(
            f"{path} cannot be read as Optuna's database ({str(e).splitlines()[0]}); remove it: the records rebuild it"
        ) from e


def study_name(sweep: Sweep, cell: Cell, data: DataConfig | None) -> str:
    """`wd_d12/d12-r12@1a2b3c`: the suffix changes with all that makes results incomparable (base config, space, sampler)."""
    space = {k: _identity(d) for k, d in sweep.space_of(cell).items()}
    variants = {k: dict(v) for k, v in sweep.variants.items()}
    sampler = sweep.sampler_of(cell)
    learning = sweep.parallel_trials if sampler in ADAPTIVE else 0
    variants = {k: {name: str(v) if isinstance(v, Times) else v for name, v in over.items()} for k, over in variants.items()}
    key = [run_id(resolve_config(sweep, cell, data=data)), space, variants, sampler, learning, list(sweep.seeds), sweep.metric]
    if sweep.objectives:
        key.append(list(sweep.objectives))
    return f"{sweep.name}/{cell.label}@{content_hash(key)[:6]}"


def _identity(dimension: Dimension) -> list[Any]:
    of = plain(dimension)
    whole: list[Any] = [type(of).__name__, *asdict(of).values()]
    return ["When", dimension.key, list(dimension.values), *whole] if isinstance(dimension, When) else whole


class CellStudy:
    """The candidates of one (sweep, cell), mirrored in an Optuna study of that name."""

    def __init__(self, sweep: Sweep, cell: Cell, storage: optuna.storages.BaseStorage, data: DataConfig | None = None) -> None:
        self.sweep, self.cell = sweep, cell
        self.space: Space = {VARIANT: Choice(sweep.variants)} if sweep.variants else sweep.space_of(cell)
        self.sampler = sweep.sampler_of(cell)
        self.name = study_name(sweep, cell, data)
        self._fixed = fixed_candidates(sweep, cell, self.space, self.sampler, self.name)
        _check_sampler(self.sampler, self.space, sweep.name)
        self._study = optuna.create_study(
            study_name=self.name, storage=storage, directions=sweep.directions, load_if_exists=True, sampler=self._make_sampler(0)
        )
        if not self._study.user_attrs:
            for key, value in {"sweep": sweep.name, "cell": cell.label, "question": sweep.question}.items():
                self._study.set_user_attr(key, value)
        self.candidates: list[Candidate] = []
        self._cached: dict[str, BaseDistribution] | None = None
        self._wider = _Wider()
        self._take_wider(self._study.user_attrs.get(WIDER))
        self._adopt()

    @property
    def total(self) -> int:
        return len(self._fixed) if self._fixed is not None else self.sweep.num_trials + self._wider.trials

    @property
    def exhausted(self) -> bool:
        """No further candidate will come (unless the grid is extended)."""
        return len(self.candidates) >= self.total

    def describe(self) -> dict[str, Any]:
        """What it takes to make the study again from records: its name, Optuna's distributions, whether suggestions learn."""
        distributions = {k: distribution_to_json(d) for k, d in self._distributions().items()}
        return {"study": self.name, "learns": self.sampler in ADAPTIVE, "distributions": distributions}

    def _distributions(self) -> dict[str, BaseDistribution]:
        if self._cached is None:
            self._cached = {k: _distribution(self._wider.ranges.get(k, d), self._values_of(k)) for k, d in self.space.items()}
        return self._cached

    def next_candidate(self) -> Candidate | None:
        """A new candidate, or None when there is none (yet): the space is exhausted, or results must come in first."""
        number = len(self.candidates)
        if self.exhausted or not self._may_ask(number):
            return None
        if self._fixed is not None:
            values = dict(self._fixed[number])
            trial_number, trial_id = self._add_running(values)
        else:
            self._study.sampler = self._make_sampler(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                trial = self._study.ask()
                values = self._suggest(trial)
            trial_number, trial_id = trial.number, trial._trial_id
        candidate = Candidate(number=number, values=values, trial_number=trial_number, trial_id=trial_id)
        self.candidates.append(candidate)
        return candidate

    def _add_running(self, values: dict[str, Value]) -> tuple[int, int]:
        """A running trial with given values, made in one write: enqueueing and asking leave half a trial when cut off."""
        distributions = {k: d for k, d in self._distributions().items() if k in values}
        trial = optuna.trial.create_trial(state=TrialState.RUNNING, params=values, distributions=distributions)
        trial_id = self._study._storage.create_new_trial(self._study._study_id, template_trial=trial)
        return self._study._storage.get_trial_number_from_id(trial_id), trial_id

    def _suggest(self, trial: optuna.trial.Trial) -> dict[str, Value]:
        """Values of the dimensions that apply, in the space's order: a condition looks at those before it."""
        values: dict[str, Value] = {}
        for key, distribution in self._distributions().items():
            if is_active(self.space[key], values):
                values[key] = trial._suggest(key, distribution)
        return values

    def _may_ask(self, number: int) -> bool:
        seen = self.candidates[: num_awaited(self.sampler, number, self.sweep.parallel_trials)]
        if any(c.outcome is None for c in seen):
            return False
        for candidate in seen:
            self._tell(candidate)
        return True

    def finish(
        self, number: int, outcome: Outcome, values: Sequence[float] | None, curve: Sequence[CurvePoint] = (), **attrs: Any
    ) -> None:
        """All runs of a candidate are done; `values`: one an objective. One that is not finite counts as failed: Optuna would
        wait for ever."""
        candidate = self.candidates[number]
        known = tuple(values or ())
        if outcome == "complete" and (len(known) != len(self.sweep.metrics) or not all(map(math.isfinite, known))):
            outcome = "failed"
        candidate.outcome, candidate.curve, candidate.attrs = outcome, tuple(thin(curve)), attrs
        candidate.values_told = known if outcome == "complete" else ()
        if self.sampler not in ADAPTIVE:
            self._tell(candidate)
        elif self.exhausted and all(c.outcome for c in self.candidates):
            for c in self.candidates:
                self._tell(c)

    def release(self) -> None:
        """A command ends: what it leaves unfinished waits for the next one, in Optuna too, where RUNNING would stay for ever."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def extend(self, values: Sequence[Mapping[str, Value]]) -> None:
        """Add candidates to a grid."""
        assert self._fixed is not None and self.sampler == "grid"
        known = {tuple(f.items()) for f in self._fixed}
        self._fixed += [dict(v) for v in values if tuple(v.items()) not in known]
        self._cached = None

    def widen(self, ranges: Mapping[str, Uniform | LogUniform], more_trials: int) -> None:
        """Search on, in wider ranges. Kept in the study, so that a sweep that is cut off asks for the same runs."""
        plain_ranges = {k: [type(d).__name__, d.low, d.high] for k, d in ranges.items()}
        self._study.set_user_attr(WIDER, {"ranges": plain_ranges, "trials": more_trials})
        self._take_wider({"ranges": plain_ranges, "trials": more_trials})

    def _take_wider(self, facts: Mapping[str, Any] | None) -> None:
        kinds: dict[str, type[Uniform] | type[LogUniform]] = {"Uniform": Uniform, "LogUniform": LogUniform}
        if facts:
            ranges = {k: kinds[name](low, high) for k, (name, low, high) in facts["ranges"].items()}
            self._wider = _Wider(ranges=ranges, trials=int(facts["trials"]))
            self._cached = None

    def _tell(self, candidate: Candidate) -> None:
        if candidate.told or candidate.outcome is None:
            return
        if candidate.adopted_finished:
            self._add_retry(candidate)
        else:
            curve = candidate.curve if len(self.sweep.metrics) == 1 else ()  # Optuna keeps curves of one objective only
            values: Sequence[float] | None = candidate.values_told if candidate.outcome == "complete" else None
            if candidate.outcome == "pruned" and curve:
                values = (curve[-1].val_bpb,)  # as Optuna's own tell does
            state = _STATES[candidate.outcome]
            finish_trial(self._study._storage, candidate.trial_id, state, values, candidate.attrs, curve)
        candidate.told = True
        candidate.curve, candidate.attrs = (), {}  # 20,000 of them must fit into the driver

    def _add_retry(self, candidate: Candidate) -> None:
        """A candidate told failed that later succeeded: Optuna's finished trials cannot change, so a new one says it."""
        old = self._trial(candidate)
        if candidate.outcome != "complete" or old.state == TrialState.COMPLETE:
            return
        self._study.add_trial(
            optuna.trial.create_trial(
                params=old.params,
                distributions=old.distributions,
                values=candidate.values_told,
                user_attrs={**candidate.attrs, RETRY_OF: candidate.trial_number},
            )
        )

    def _trial(self, candidate: Candidate) -> FrozenTrial:
        return self._study._storage.get_trial(candidate.trial_id)

    def _adopt(self) -> None:
        """Take over what the study holds. Trials that Optuna believes to be running are candidates again, under their numbers;
        one cut off while it was being created gets its missing values as it would have got them."""
        trials = self._study.get_trials(deepcopy=False)
        retried = {t.user_attrs[RETRY_OF] for t in trials if RETRY_OF in t.user_attrs}
        for trial in trials:
            if RETRY_OF in trial.user_attrs:
                continue
            number = len(self.candidates)
            if self._fixed is not None and number >= len(self._fixed):
                self._fixed.append(_like_grid(self.space, trial.params))  # of an extension of the grid
            if trial.state == TrialState.WAITING:  # left by an earlier command, or queued by hand with a dashboard
                self._study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            finished = trial.state.is_finished()
            candidate = Candidate(
                number=number, values={}, trial_number=trial.number, trial_id=trial._trial_id, adopted_finished=finished
            )
            candidate.values = self._fixed[number] if self._fixed is not None else self._complete_params(trial, number)
            if finished and (trial.state == TrialState.COMPLETE or trial.number in retried):
                candidate.told = True
            self.candidates.append(candidate)

    def _complete_params(self, trial: FrozenTrial, number: int) -> dict[str, Value]:
        if not trial.state.is_finished():
            self._study.sampler = self._make_sampler(number)
            return self._suggest(optuna.trial.Trial(self._study, trial._trial_id))
        return {k: trial.params[k] for k in self.space if k in trial.params}

    def _values_of(self, key: str) -> tuple[Value, ...]:
        return tuple(f[key] for f in self._fixed if key in f) if self._fixed is not None else ()

    def _make_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int(content_hash([self.name, number])[:8], 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self.sampler == "tpe":
                conditional = any(isinstance(d, When) for d in self.space.values())
                return optuna.samplers.TPESampler(
                    seed=seed, multivariate=True, group=conditional, constant_liar=True, n_startup_trials=STARTUP_TRIALS
                )
            if self.sampler == "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, deterministic_objective=False)
            if self.sampler == "cmaes":
                return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
            return optuna.samplers.RandomSampler(seed=seed)  # candidates are given, nothing is sampled


def _like_grid(space: Space, params: Mapping[str, Any]) -> dict[str, Value]:
    """Optuna keeps the numbers of a grid as floats; whole numbers of a whole grid are integers again."""
    values = dict(params)
    for key, dimension in ((k, plain(d)) for k, d in space.items() if k in params):
        if isinstance(dimension, Grid) and all(isinstance(v, int) for v in dimension.values):
            values[key] = round(values[key])
    return values


def thin(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """At most MAX_INTERMEDIATE finite points of a curve, the last always among them."""
    finite = [p for p in curve if math.isfinite(p.val_bpb)]
    if len(finite) <= MAX_INTERMEDIATE:
        return finite
    return [finite[round(i)] for i in np.linspace(0, len(finite) - 1, MAX_INTERMEDIATE)]


def _check_sampler(sampler: str, space: Space, sweep: str) -> None:
    other = [f"{k} is a {type(d).__name__}" for k, d in space.items() if not isinstance(d, Uniform | LogUniform)]
    if sampler == "cmaes" and (other or len(space) < 2):
        found = other[0] if other else f"this space has {len(space)}"
        raise ConfigError(f"sweep {sweep}: sampler cmaes needs two or more ranges (Uniform, LogUniform); {found}: use tpe")


def _distribution(dimension: Dimension, values: Sequence[Value]) -> BaseDistribution:
    """Optuna's distribution. A fixed list of numbers is shown as a range, so that plots get an axis and it may grow."""
    dimension = plain(dimension)
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    if isinstance(dimension, Grid):
        if not values:
            return CategoricalDistribution(dimension.values)  # a learning sampler picks among them
        numbers = [float(v) for v in values]
        low, high = min(numbers), max(numbers)
        return FloatDistribution(low, high, log=low > 0 and low < high)
    return FloatDistribution(dimension.low, dimension.high, log=isinstance(dimension, LogUniform))
