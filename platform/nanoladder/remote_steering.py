"""Looking at a sweep, and ending it, through a storage at a URL: nodes that share no folder share that.

The driver puts its status files there every few seconds and looks there for requests to end. What it asks of a run (the file
`stop` in the run's folder, to pause or prune it) goes there as well, and the process that trains looks for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat_model.errors import ConfigError
from nanochat_model.identity import write_atomic
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.listen import Listener
from nanoladder.live_status import STATUS_FILE
from nanoladder.stopping import REQUEST_FILE
from nanoladder.storage import Remote
from nanoladder.sweep import Sweep
from nanoladder.trial_spec import STOP_FILE
from nanoladder.workspace import Workspace

LOOK_SECONDS = 5.0  # between two looks at the URL, of the driver and of each process that trains
CLOSE_SECONDS = 30.0  # how long the end of a command waits for the thread
log = logging.getLogger(__name__)


class RemoteSteering(Listener):
    """The driver's side: one thread carries status files to the URL, requests from there, and requests to runs there."""

    def __init__(self, workspace: Workspace) -> None:
        self._remote, self._root = Remote(workspace.remote), workspace.root
        fetch_statuses(workspace)  # what earlier commands on other machines lost counts on
        self._sweeps: tuple[str, ...] = ()
        self._sent: dict[str, str] = {}  # status files as they are at the URL
        self._running: set[str] = set()
        self._asked: set[str] = set()  # runs with a request at the URL
        self._over = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="steering", daemon=True)

    def on_begin(self, sweeps: Sequence[Sweep]) -> None:
        self._sweeps = tuple(s.name for s in sweeps)
        for name in self._sweeps:
            self._remote.delete_file(f"sweeps/{name}/{REQUEST_FILE}")  # of before this command
        self._thread.start()

    def on_start(self, trial: Trial, attempt: int) -> None:
        self._running.add(trial.run_id)

    def on_failure(self, trial: Trial, error: str, traceback: str, retry: bool) -> None:
        self._running.discard(trial.run_id)

    def on_pause(self, trial: Trial) -> None:
        self._running.discard(trial.run_id)

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        self._running.discard(trial.run_id)

    def on_end(self) -> None:
        """The last status goes out here: the listeners before this one have written it."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        self._running.clear()
        self._round()

    def _work(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._round()

    def _round(self) -> None:
        try:
            for name in self._sweeps:
                self._send_status(name)
                self._fetch_request(name)
            self._ask_runs()
        except ConfigError as e:
            if not self._warned:
                log.warning("status and stop do not reach other machines: %s", e)
            self._warned = True

    def _send_status(self, name: str) -> None:
        path = f"sweeps/{name}/{STATUS_FILE}"
        with contextlib.suppress(FileNotFoundError):
            text = (self._root / path).read_text(encoding="utf8")
            if self._sent.get(name) != text:
                self._remote.put_text(path, text)
                self._sent[name] = text

    def _fetch_request(self, name: str) -> None:
        path = f"sweeps/{name}/{REQUEST_FILE}"
        text = self._remote.get_text(path)
        if text is not None:
            write_atomic(self._root / path, text)

    def _ask_runs(self) -> None:
        running = frozenset(self._running)
        for run_id in running - self._asked:
            path = f"runs/{run_id}/{STOP_FILE}"
            with contextlib.suppress(FileNotFoundError):
                self._remote.put_text(path, (self._root / path).read_text(encoding="utf8"))
                self._asked.add(run_id)
        for run_id in self._asked - running:  # it has ended: nothing may stop it when it is taken up again
            self._remote.delete_file(f"runs/{run_id}/{STOP_FILE}")
            self._asked.discard(run_id)


@contextlib.contextmanager
def heed_remote_stop(url: str, root: Path, run_dir: Path) -> Iterator[None]:
    """The side of a process that trains: while inside, a request for this run at the URL becomes one in its folder here."""
    remote, over, path = Remote(url), threading.Event(), (run_dir / STOP_FILE).relative_to(root).as_posix()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            try:
                text = remote.get_text(path)
                if text is not None:
                    write_atomic(run_dir / STOP_FILE, text)
                    remote.delete_file(path)
            except ConfigError as e:  # the next look may get through
                log.warning("requests to end run %s are not seen: %s", run_dir.name, e)

    thread = threading.Thread(target=look, name="heed-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def fetch_statuses(workspace: Workspace) -> None:
    """Bring the status files of the working copy up to those at the URL. What the driver wrote last counts."""
    remote = Remote(workspace.remote)
    for path in remote.listing("sweeps"):
        text = remote.get_text(path) if path.endswith(f"/{STATUS_FILE}") else None
        if text is not None and _written_at(text) > _written_at(_read(workspace.root / path)):
            write_atomic(workspace.root / path, text)


def send_request(workspace: Workspace, sweep: str) -> None:
    """Put the request that lies in the working copy to the URL."""
    path = f"sweeps/{sweep}/{REQUEST_FILE}"
    Remote(workspace.remote).put_text(path, (workspace.root / path).read_text(encoding="utf8"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8")
    except FileNotFoundError:
        return ""


def _written_at(status: str) -> str:
    """ISO time in UTC, which sorts as text; "" for what is no status."""
    try:
        return str(json.loads(status)["updated_at"])
    except (ValueError, KeyError, TypeError):
        return ""
