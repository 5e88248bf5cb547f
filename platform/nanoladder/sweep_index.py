"""sweeps/<name>/index.json: which runs belong to a sweep, with cell, candidate, values and seed.

A record may serve several sweeps and names only the first; the index says it for each. It can be rebuilt by running the
sweep's command again, which then only reads records.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_model.identity import write_atomic
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.facts_file import SCHEMA_VERSION, read_facts
from nanoladder.front import write_front
from nanoladder.listen import Listener
from nanoladder.pool import CellWork, metric_of
from nanoladder.sweep import Sweep
from nanoladder.workspace import Workspace

INDEX_FILE = "index.json"
WRITE_SECONDS = 2.0  # between two writes while a sweep runs, at least,
WRITE_SHARE = 30.0  # and so many times what the last one took


class IndexWriter(Listener):
    """Keeps the index of each sweep."""

    def __init__(self, workspace: Workspace, works: Sequence[CellWork]) -> None:
        self._workspace = workspace
        self._works = works
        self._sweeps: dict[str, Sweep] = {}
        self._rows: dict[str, dict[tuple[str, int, int], dict[str, Any]]] = {}
        self._dirty: set[str] = set()
        self._next_write = 0.0

    def on_begin(self, sweeps: Sequence[Sweep]) -> None:
        self._sweeps = {s.name: s for s in sweeps}
        self._rows = {s.name: {} for s in sweeps}
        self._dirty = set(self._sweeps)

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        self._rows[trial.sweep][(trial.cell, trial.candidate, trial.seed)] = {
            "run_id": trial.run_id,
            "cell": trial.cell,
            "candidate": trial.candidate,
            "values": dict(trial.values),
            "seed": trial.seed,
            "status": record.status,
            **{m: metric_of(self._sweeps[trial.sweep], record, m) for m in self._sweeps[trial.sweep].metrics},
        }
        self._dirty.add(trial.sweep)
        if time.monotonic() > self._next_write:
            self._write()

    def on_end(self) -> None:
        self._write()
        for name in (s.name for s in self._sweeps.values() if s.objectives):
            folder = self._workspace.sweep_dir(name)
            write_front(read_index(folder), folder)

    def _write(self) -> None:
        begun = time.monotonic()
        for name in sorted(self._dirty):
            sweep = self._sweeps[name]
            rows = [self._rows[name][key] for key in sorted(self._rows[name])]
            head = {"schema_version": SCHEMA_VERSION, "sweep": name, "question": sweep.question, "source": sweep.source}
            head |= {"stage": sweep.stage, "purpose": sweep.purpose, "metric": sweep.metric, "direction": sweep.direction}
            head |= {"seeds": list(sweep.seeds)}
            head |= {"objectives": dict(zip(sweep.metrics, sweep.directions, strict=True))}
            head |= {"studies": {w.cell.label: w.study.describe() for w in self._works if w.sweep.name == name}, "trials": rows}
            write_atomic(self._workspace.sweep_dir(name) / INDEX_FILE, json.dumps(head, indent=1))
        self._dirty.clear()
        now = time.monotonic()
        self._next_write = now + max(WRITE_SECONDS, WRITE_SHARE * (now - begun))  # long lists are written less often


def read_index(path: Path) -> dict[str, Any]:
    """The index of a sweep (its folder or file). ConfigError where it is missing, broken or of another schema."""
    path = path / INDEX_FILE if path.is_dir() else path
    return read_facts(path, "sweep index", "run the sweep's command again")
