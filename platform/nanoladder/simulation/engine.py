"""Time passes: runs are given out, start, save, end, fail; nodes fail and come back. Events in a heap, nothing else moves.

Every device-second of the fleet falls under one of KINDS. Runs book what they held when they end, the clock books the rest, so
that the sum over kinds checks both.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanoladder.cells import Trial
from nanoladder.handout import Room
from nanoladder.pool import Pool
from nanoladder.simulation.fleet import Fleet, Job, Overheads, Workers

# useful: training that counted, at the median speed; slow: what slower devices took beyond it; start: processes, workers,
# first step, driver; save: checkpoints; lost: work that a failure undid, and devices held until it was noticed
KINDS = ("useful", "slow", "start", "save", "lost", "down", "idle")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """The process of the run that is given out as number `run` (from 0) dies `after` seconds from its first step."""

    run: int
    after: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What held a slot of a node, or (slot −1) the whole node, from `start` to `end`."""

    node: int
    slot: int
    start: float
    end: float
    kind: str
    name: str


@dataclass(eq=False)
class _Attempt:
    trial: Trial
    job: Job
    number: int
    slots: list[tuple[int, int]] = field(default_factory=list)  # node, slot
    placed_at: float = 0.0
    first_step: float = math.inf
    slowdown: float = 1.0
    done_before: float = 0.0
    completed: bool = False
    ended: float | None = None  # when; the driver knows it later
    cold: bool = False  # its process is new


class Engine:
    """One fleet. `run` may be called several times: clock, nodes and what is saved stay, processes do not."""

    def __init__(
        self,
        fleet: Fleet,
        workers: Workers,
        overheads: Overheads,
        *,
        spread: float = 0.0,
        seed: int = 0,
        max_concurrent: int | None = None,
        kills: Sequence[Kill] = (),
        keep_bars: bool = False,
    ) -> None:
        """`spread`: standard deviation of the logarithm of a device's speed, drawn for each attempt."""
        self.fleet, self.workers, self.overheads = fleet, workers, overheads
        self._max_concurrent, self._spread = max_concurrent, spread
        self._kills = {k.run: k.after for k in kills}
        failures, speeds = np.random.SeedSequence(seed).spawn(2)
        self._failures, self._speeds = np.random.default_rng(failures), np.random.default_rng(speeds)
        self.now = 0.0
        self.seconds = dict.fromkeys(KINDS, 0.0)  # of devices
        self.node_failures: list[tuple[float, int]] = []
        self.given_out = self.failed_attempts = 0
        self.bars: list[Bar] | None = [] if keep_bars else None
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._up = [True] * fleet.num_nodes
        self._free: list[list[int]] = [[] for _ in self._up]  # slots of each node
        self._saved: dict[str, float] = {}  # run_id -> seconds of training that its newest checkpoint holds
        self._active: set[_Attempt] = set()
        self._driver_free = 0.0
        self._pool: Pool | None = None
        self._new_stage()
        for node in range(fleet.num_nodes):
            self._free[node] = list(range(workers.slots_per_node))
            self._plan_failure(node)

    def _new_stage(self) -> None:
        self._room = Room(self._max_concurrent)
        self._held: Trial | None = None
        self._pending: list[_Attempt] = []  # waiting for a place or a process, in the order in which they were given out
        self._warm: set[tuple[int, int]] = set()  # slots with an idle process
        self._idle_drivers = 0  # idle processes that have driven Ray Train

    # --- one stage of a command ---

    def run(self, pool: Pool, job_of: Callable[[Trial], Job], finish: Callable[[Trial, bool], None]) -> None:
        """Until the pool is dry. `finish(trial, completed)` tells the pool how an attempt ended."""
        self._pool, self._job_of, self._finish = pool, job_of, finish
        self._new_stage()
        self._give_out()
        while self._active or not pool.done:
            self._next_event()

    def wait(self, seconds: float) -> None:
        """Nothing is given out for so long."""
        ended: list[bool] = []
        self._at(self.now + seconds, lambda: ended.append(True))
        while not ended:
            self._next_event()

    def _next_event(self) -> None:
        assert self._events, "nothing can happen any more, and runs are left"
        time, _, act, args = heapq.heappop(self._events)
        span, up = time - self.now, sum(self._up)
        free = sum(len(f) for f, is_up in zip(self._free, self._up, strict=True) if is_up)
        beside = self.fleet.devices_per_node - self.workers.slots_per_node * self.workers.devices_per_slot
        self.seconds["down"] += span * (len(self._up) - up) * self.fleet.devices_per_node
        self.seconds["idle"] += span * (free * self.workers.devices_per_slot + up * beside)
        self.now = time
        act(*args)

    def _at(self, time: float, act: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, act, args))

    def _driver(self) -> float:
        """When the driver, which does one thing at a time, has started or ended a trial."""
        self._driver_free = max(self.now, self._driver_free) + self.overheads.driver / 2
        return self._driver_free

    # --- runs ---

    def _give_out(self) -> None:
        """As Tune with the real scheduler: no further run while as many as may be wait for a place or a process."""
        while self._pool is not None and len(self._pending) < self.overheads.pending and not self._room.full:
            trial = self._held or self._pool.next()
            self._held = None
            if trial is None:
                return
            if not self._room.fits(self.workers.need, self.workers.capacity_of(sum(self._up))):
                self._held = trial
                return
            self._room.take(self.workers.need)
            attempt = _Attempt(trial=trial, job=self._job_of(trial), number=self.given_out)
            self.given_out += 1
            self._pending.append(attempt)
            self._active.add(attempt)
            self._place()

    def _place(self) -> None:
        """Give the runs that wait a place, as far as there is room."""
        for attempt in self._pending:
            if attempt.slots or attempt.ended is not None:  # placed, or lost with its node
                continue
            slots = self._find_slots(attempt.job)
            if slots is None:
                return
            self._put(attempt, slots)

    def _put(self, attempt: _Attempt, slots: Sequence[tuple[int, int]]) -> None:
        for node, slot in slots:
            self._free[node].remove(slot)
        attempt.slots, attempt.placed_at = list(slots), self.now
        warm = slots[0] in self._warm if attempt.job.own_process else self._idle_drivers > 0
        self._warm -= set(slots)
        if not attempt.job.own_process and warm:
            self._idle_drivers -= 1
        attempt.cold = not warm
        self._at(self._driver() + (0.0 if warm else self.overheads.process), self._started, attempt)

    def _find_slots(self, job: Job) -> list[tuple[int, int]] | None:
        """Idle processes first, else the fullest node that holds all workers, else as few nodes as possible. None: no room."""
        count = self.workers.count
        free = [(len(slots), node) for node, slots in enumerate(self._free) if slots and self._up[node]]
        if sum(n for n, _ in free) < count:
            return None
        if job.own_process and self._warm:
            return [min(self._warm)]
        whole = [(n, node) for n, node in free if n >= count]
        chosen = [min(whole)] if whole else sorted(free, reverse=True)
        return [(node, slot) for _, node in chosen for slot in sorted(self._free[node])][:count]

    def _started(self, attempt: _Attempt) -> None:
        if attempt in self._pending:
            self._pending.remove(attempt)
        if attempt.ended is None:
            self._begin(attempt)
        self._give_out()

    def _begin(self, attempt: _Attempt) -> None:
        job, rid = attempt.job, attempt.trial.run_id
        devices = max(1, round(self.workers.count * self.workers.devices_per_slot))
        attempt.slowdown = math.exp(self._spread * float(self._speeds.standard_normal(devices).max()))  # the slowest sets the pace
        attempt.done_before = self._saved.get(rid, 0.0)
        imports = self.overheads.imports if attempt.cold else 0.0
        attempt.first_step = self.now + job.start + (imports if job.own_process else self.overheads.train_start)
        self._at(attempt.first_step + job.seconds_from(attempt.done_before, attempt.slowdown), self._trained, attempt)
        if attempt.number in self._kills:
            self._at(attempt.first_step + self._kills[attempt.number], self._killed, attempt)

    def _trained(self, attempt: _Attempt) -> None:
        if attempt.ended is None:
            self._end(attempt, completed=True)
            self._at(self._driver(), self._settle, attempt)

    def _killed(self, attempt: _Attempt) -> None:
        if attempt.ended is None:
            self._end(attempt, completed=False)
            self._at(self._driver(), self._settle, attempt)

    def _settle(self, attempt: _Attempt) -> None:
        """The driver knows that an attempt has ended: slots are free again, and the pool says what is next."""
        self._active.discard(attempt)
        if attempt in self._pending:
            self._pending.remove(attempt)
        self._hold(attempt, attempt.slots)
        for node, slot in attempt.slots:
            self._free[node].append(slot)
        if attempt.completed and attempt.job.own_process:
            self._warm |= set(attempt.slots)
        elif not attempt.job.own_process:
            self._idle_drivers += 1
        self._room.give_back(self.workers.need)
        self.failed_attempts += not attempt.completed
        self._finish(attempt.trial, attempt.completed)
        self._place()
        self._give_out()

    # --- nodes ---

    def _plan_failure(self, node: int) -> None:
        if math.isfinite(self.fleet.mtbf_hours):
            self._at(self.now + float(self._failures.exponential(self.fleet.mtbf_hours * 3600)), self._node_fails, node)

    def _node_fails(self, node: int) -> None:
        self.node_failures.append((self.now, node))
        hit = [a for a in self._active if any(n == node for n, _ in a.slots)]
        for attempt in sorted(hit, key=lambda a: a.number):
            on_node = [s for s in attempt.slots if s[0] == node]
            if attempt.ended is None:
                self._end(attempt, completed=False)
                self._at(self.now + self.overheads.detect, self._settle, attempt)
            else:
                self._hold(attempt, on_node)
            attempt.slots = [s for s in attempt.slots if s[0] != node]
        self._warm = {s for s in self._warm if s[0] != node}
        self._up[node] = False
        back = self.now + self.fleet.repair_hours * 3600
        if self.bars is not None:
            self.bars.append(Bar(node=node, slot=-1, start=self.now, end=back, kind="down", name=f"node {node}"))
        self._at(back, self._node_returns, node)

    def _node_returns(self, node: int) -> None:
        self._up[node] = True
        self._free[node] = list(range(self.workers.slots_per_node))
        self._plan_failure(node)
        self._place()
        self._give_out()

    # --- books ---

    def _end(self, attempt: _Attempt, *, completed: bool) -> None:
        """An attempt ends now: what it has done with its slots."""
        attempt.ended, attempt.completed = self.now, completed
        job, first = attempt.job, min(attempt.first_step, self.now)
        elapsed, left = self.now - first, job.seconds - attempt.done_before
        saves = job.saves_in(left * attempt.slowdown) if completed else job.saved_at(elapsed)
        trained = left if completed else min(left, saves * job.save_every / attempt.slowdown if saves else 0.0)
        self._saved[attempt.trial.run_id] = attempt.done_before + trained
        self._record(attempt, "start" if completed else "lost", attempt.placed_at, first, attempt.slots)
        split = {"useful": trained * min(1.0, attempt.slowdown), "slow": trained * max(0.0, attempt.slowdown - 1.0)}
        split["save"] = saves * job.save_seconds
        split["lost"] = max(0.0, elapsed - sum(split.values()))
        for kind, seconds in split.items():
            self._record(attempt, kind, first, first + seconds, attempt.slots)
            first += seconds

    def _hold(self, attempt: _Attempt, slots: Sequence[tuple[int, int]]) -> None:
        """Slots that were held from an attempt's end until now, when the driver (or the next failure) took note."""
        assert attempt.ended is not None
        self._record(attempt, "start" if attempt.completed else "lost", attempt.ended, self.now, slots)

    def _record(self, attempt: _Attempt, kind: str, start: float, end: float, slots: Sequence[tuple[int, int]]) -> None:
        self.seconds[kind] += (end - start) * self.workers.devices_per_slot * len(slots)
        if self.bars is not None and end > start:
            self.bars += [Bar(node=n, slot=s, start=start, end=end, kind=kind, name=attempt.trial.name) for n, s in slots]
