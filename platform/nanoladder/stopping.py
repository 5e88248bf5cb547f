"""Ending a sweep from outside: a small file in its folder, which its driver looks for.

Who asks may be another process or another machine: all it needs is the storage. Trials that save checkpoints save one and end
at once, short ones (which save none) run to their end unless asked to end `now`. The sweep's command goes on from there.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_model.identity import write_atomic
from nanochat_model.record import RunRecord

REQUEST_FILE = "stop.json"  # in a sweep's folder
PAUSED = "paused on request: the sweep's command goes on from its checkpoint"  # error of such a run's record
POLL_SECONDS = 1.0


class SweepStopped(Exception):
    """A sweep ended because it was asked to. Its message says how far it is."""


@dataclass(frozen=True, kw_only=True)
class StopRequest:
    """`now`: also end trials that save no checkpoints; what they have trained is lost."""

    now: bool
    requested_at: str
    requested_by: str

    @classmethod
    def read(cls, sweep_dir: Path) -> StopRequest | None:
        """The request in a sweep's folder. One that cannot be read counts as a plain request: somebody wants an end."""
        try:
            text = (sweep_dir / REQUEST_FILE).read_text(encoding="utf8")
        except FileNotFoundError:
            return None
        try:
            plain = json.loads(text)
            return cls(**{k: plain[k] for k in ("now", "requested_at", "requested_by")})
        except (ValueError, KeyError, TypeError):
            return cls(now=False, requested_at="", requested_by="")


def request_stop(sweep_dir: Path, *, now: bool = False) -> StopRequest:
    """Ask the driver of the sweep in `sweep_dir` to end."""
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    request = StopRequest(now=now, requested_at=at, requested_by=f"process {os.getpid()} on {socket.gethostname()}")
    write_atomic(sweep_dir / REQUEST_FILE, json.dumps(asdict(request)))
    return request


class StopWatch:
    """Looks for requests to end any of the sweeps of a command, every second at most. Old requests go when it is made."""

    def __init__(self, sweep_dirs: Sequence[Path]) -> None:
        self._dirs = tuple(sweep_dirs)
        self._looked = 0.0
        self.clear()

    def clear(self) -> None:
        for folder in self._dirs:
            (folder / REQUEST_FILE).unlink(missing_ok=True)

    def poll(self) -> StopRequest | None:
        if time.monotonic() - self._looked < POLL_SECONDS:
            return None
        self._looked = time.monotonic()
        found = [r for folder in self._dirs if (r := StopRequest.read(folder)) is not None]
        return next((r for r in found if r.now), found[0] if found else None)


def is_paused(record: RunRecord) -> bool:
    """Whether a run was ended by such a request: it is not done, and the sweep's command takes it up again."""
    return record.status == "stopped" and record.error == PAUSED
