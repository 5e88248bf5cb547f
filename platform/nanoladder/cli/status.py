"""nanoladder status and stop: look at sweeps that run somewhere, and end them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

import tyro

from nanoladder.cli.common import Json, Storage, print_json
from nanoladder.job_context import default_storage
from nanoladder.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far sweeps are: stage, running, done, failed and why, best, time left, device-hours and money so far.

    Reads what their drivers write under the storage root, so it works from any process or machine that sees it.

    Example: nanoladder status wd_d20 --storage /shared/runs --watch --price 2.5
    """

    mirrored: ClassVar[bool] = False  # of a storage at a URL it reads the status files alone
    sweep: tyro.conf.Positional[str] = ""
    """A sweep or ladder; left out: all under the storage root."""
    storage: Storage = field(default_factory=default_storage)
    watch: bool = False
    """Show it again every two seconds until nothing runs any more."""
    price: float | None = None
    """Dollars a device-hour."""
    json: Json = False

    def run(self) -> int:
        from nanoladder.status_view import read_statuses, show, watch

        workspace = Workspace(self.storage)
        if self.watch and not self.json:
            watch(lambda: read_statuses(workspace, self.sweep, price=self.price), detail=bool(self.sweep))
            return 0
        statuses = read_statuses(workspace, self.sweep, price=self.price)
        if self.json:
            print_json({"sweeps": statuses})
            while self.watch and any(s["alive"] for s in statuses):
                time.sleep(2)
                statuses = read_statuses(workspace, self.sweep, price=self.price)
                print_json({"sweeps": statuses})
        else:
            show(statuses, detail=bool(self.sweep))
        return 0


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End a sweep that runs: no further trial starts, running ones save a checkpoint and end, the driver leaves (status 3).

    Trials too short to save checkpoints run to their end; --now ends them too, and their work is lost. The sweep's own command
    goes on from there. Other sweeps of the same command end with it.

    Example: nanoladder stop wd_d20 --storage /shared/runs
    """

    mirrored: ClassVar[bool] = False
    sweep: tyro.conf.Positional[str]
    """A sweep, or a ladder: then its stage that runs."""
    storage: Storage = field(default_factory=default_storage)
    now: bool = False
    """Also end trials that save no checkpoints."""
    wait: float = 600.0
    """Seconds to wait for the end; 0: only ask. Exit status 1 when it has not ended by then."""
    json: Json = False

    def run(self) -> int:
        from nanoladder.status_view import stop_sweep

        result = stop_sweep(Workspace(self.storage), self.sweep, now=self.now, wait_seconds=self.wait)
        if self.json:
            print_json(result)
        else:
            for row in result["sweeps"]:
                print(f"{row['sweep']}: {row['state']}, {row['done']} of {row['total']} runs recorded")
        return 0 if result["ended"] or self.wait == 0 else 1
