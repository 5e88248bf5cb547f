"""Trials of one device, run in a Ray Tune actor that is used again and again: torch stays imported, caches stay warm.

Training runs in one lasting thread of the actor; `step` gives Tune a result when the run has ended, and every few seconds
until then. Runs over several devices leave from the same actor through Ray Train.
"""

from __future__ import annotations

import gc
import queue
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory

from nanochat_model.errors import ConfigError
from nanoladder.own_devices import see_own_devices
from nanoladder.run_lock import ORPHAN_SECONDS, exclusive
from nanoladder.system_use import SystemUse
from nanoladder.trial_spec import Forward, TrialSpec

REPORT_SECONDS = 5.0  # how often a long run reports to the driver
SPEC = "spec"
# A trial that runs Ray Train needs next to nothing itself. Its resource must not be one that its workers ask for: with a
# share of the CPUs it would starve a run that wants them all. Every cluster has a head node with one unit of this, enough for a
# thousand such trials at a time.
TRAIN_DRIVER_RESOURCES = {"node:__internal_head__": 0.001}


class TrialActor(tune.Trainable):
    """`config` is {"spec": JSON of a TrialSpec}. The last result of a run has "done" and "status": complete, stopped, failed
    or bad_config (what a user can mend), and "error" unless complete."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        spec = TrialSpec.from_json(config[SPEC])
        if spec.backend == "train" or not spec.node_labels:
            return PlacementGroupFactory([trial_resources(spec)])
        return PlacementGroupFactory([trial_resources(spec)], bundle_label_selector=[spec.node_labels])

    def setup(self, config: dict[str, Any]) -> None:
        """Starts nothing yet: Tune may make an actor for a trial and then give that trial to another that came free."""
        see_own_devices()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train")
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self._spec = TrialSpec.from_json(config[SPEC])
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._outcome: Future[dict[str, Any]] | None = None

    def step(self) -> dict[str, Any]:
        if self._outcome is None:
            self._outcome = self._thread.submit(run_trial, self._spec, self._events)
        try:
            outcome = self._outcome.result(timeout=REPORT_SECONDS)
        except TimeoutError:
            return {"run_id": self._spec.run_id, "events": self._drain(), "done": False}
        gc.collect()
        return {"run_id": self._spec.run_id, "events": self._drain(), "done": True, **outcome}

    def _drain(self) -> list[dict[str, Any]]:
        """Every evaluation and the latest step since the last call."""
        events: list[dict[str, Any]] = []
        latest: dict[str, Any] = {}
        while not self._events.empty():
            event = self._events.get()
            if event["event"] == "step":
                latest = event
            else:
                events.append(event)
        return [*events, latest] if latest else events

    def cleanup(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def trial_resources(spec: TrialSpec) -> dict[str, float]:
    """What Tune reserves for the trial itself; Ray Train reserves its workers' resources on its own."""
    return TRAIN_DRIVER_RESOURCES if spec.backend == "train" else spec.resources_per_worker


def run_trial(spec: TrialSpec, events: queue.SimpleQueue[dict[str, Any]]) -> dict[str, Any]:
    """Train, and say how it ended. Nothing is raised: Tune would take an exception for a broken actor."""
    try:
        with exclusive(Path(spec.run_dir), f"run {spec.run_id}", wait_seconds=ORPHAN_SECONDS):
            if spec.backend == "train":
                from nanoladder.train_backend import fit_trial

                record = fit_trial(spec, events.put)
            else:
                record = spec.run([Forward(events.put), SystemUse(events.put)])
        return {"status": record.status, "error": record.error or "", "traceback": ""}
    except ConfigError as e:
        return {"status": "bad_config", "error": str(e), "traceback": ""}
    except Exception as e:
        return {"status": "failed", "error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
