"""Optional pruning: stops runs that trail far behind while their learning rate is still constant, never inside its decay.

A half-decayed loss misranks recipes, so nothing is judged there. A run is asked to stop through a file in its folder; it ends
with a record that says "stopped", and Optuna is told PRUNED. What is pruned depends on who was trained before, so a sweep with
pruning does not ask for exactly the same runs when it is started again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import quantiles
from typing import Any

from nanochat_model.config import TrainConfig
from nanochat_model.identity import write_atomic
from nanochat_model.record import CurvePoint, RunRecord
from nanoladder.cells import Trial
from nanoladder.listen import Listener
from nanoladder.sweep import Sweep
from nanoladder.trial_spec import STOP_FILE
from nanoladder.workspace import Workspace

MIN_COMPLETE = 5  # runs of the same cell and seed that must have ended before any is stopped
MIN_SHARE = 0.1  # of a run's steps that are not judged
FAR_BEHIND = 0.02  # relative loss beyond the worst quarter of those: seed noise is a tenth of it


class Pruner(Listener):
    """Watches the runs of sweeps with pruning="constant"."""

    def __init__(self, workspace: Workspace, sweeps: Sequence[Sweep]) -> None:
        self._workspace = workspace
        self._watched = {s.name for s in sweeps if s.pruning == "constant"}
        self._curves: dict[tuple[str, str, int], list[tuple[CurvePoint, ...]]] = {}
        self.stopped: set[str] = set()

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        if trial.sweep in self._watched and record.status == "complete":
            self._curves.setdefault((trial.sweep, trial.cell, trial.seed), []).append(record.curve)

    def on_event(self, trial: Trial, event: dict[str, Any]) -> None:
        if event["event"] != "eval" or trial.sweep not in self._watched or trial.run_id in self.stopped:
            return
        step, loss = int(event["step"]), float(event["val_bpb"])
        if not constant_from(trial.config) <= step <= constant_until(trial.config):
            return
        share = step / trial.config.num_steps
        others = [at for c in self._curves.get((trial.sweep, trial.cell, trial.seed), ()) if (at := loss_at(c, share)) is not None]
        if is_far_behind(loss, others):
            self.stopped.add(trial.run_id)
            reason = f"pruned at step {step}: far behind in the constant part"
            write_atomic(self._workspace.run_dir(trial.run_id) / STOP_FILE, reason)  # the folder may be on another node so far


def constant_from(config: TrainConfig) -> int:
    """The first step that is judged: after the warm-up and a tenth of the run. Before, a loss tells of the start alone."""
    return max(config.schedule.warmup_steps, round(MIN_SHARE * config.num_steps))


def constant_until(config: TrainConfig) -> int:
    """The last step before the learning rate's decay begins."""
    return round(config.num_steps * (1 - config.schedule.warmdown_fraction))


def loss_at(curve: Sequence[CurvePoint], share: float) -> float | None:
    """Loss at a share of the curve's horizon, between its points linear in log; None before its first."""
    if not curve or curve[-1].step == 0:
        return None
    at = share * curve[-1].step
    before = [p for p in curve if p.step <= at]
    after = [p for p in curve if p.step >= at]
    if not before or not after:
        return None
    a, b = before[-1], after[0]
    weight = (at - a.step) / (b.step - a.step) if b.step > a.step else 0.0
    return math.exp((1 - weight) * math.log(a.val_bpb) + weight * math.log(b.val_bpb))


def is_far_behind(loss: float, others: Sequence[float]) -> bool:
    """Whether a loss is worse than three quarters of `others` by more than FAR_BEHIND; never with fewer than MIN_COMPLETE."""
    if len(others) < MIN_COMPLETE:
        return False
    return not math.isfinite(loss) or loss > quantiles(others, n=4)[2] * (1 + FAR_BEHIND)
