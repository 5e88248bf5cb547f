"""kill -9 of MLflow's server, of a whole Ray node and of the head, all in the middle of one sweep, on a real cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port
from ray_nodes import RayNodes, answers, session_of, wait_for
from sweep_driver import Driver
from toy_training import held

from nanoladder.sync import sync
from nanoladder.tracking import connect
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(90)
SUPPORT = Path(__file__).parents[1] / "support"
STEP_SECONDS = 0.1  # ten of them a run


class Tracker:
    """An MLflow server on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}", "--artifacts-destination", str(self._folder)]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # six more processes, which nobody here uses
        with (self._folder / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen([*command, *store], env=env, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """It is dead, and its port free, when this returns."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            wait_for(lambda: not answers(f"127.0.0.1:{self.port}"))

    def num_children(self) -> int:
        client = connect(self.uri)
        experiment = client.get_experiment_by_name("nanoladder")
        found = client.search_runs([experiment.experiment_id], max_results=100) if experiment is not None else []
        return sum("nanoladder.run_id" in r.data.tags for r in found)


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    nodes = RayNodes(support=SUPPORT, TOY_STEP_SECONDS=str(STEP_SECONDS))
    yield nodes
    nodes.close()


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    tracker = Tracker(tmp_path)
    tracker.start()
    yield tracker
    tracker.kill()


def test_a_sweep_survives_its_tracking_server_a_node_and_the_head(
    tmp_path: Path, nodes: RayNodes, tracker: Tracker, request: pytest.FixtureRequest
) -> None:
    head = nodes.start_head()
    other = nodes.start_node()
    driver = Driver(tmp_path, num_runs=12)
    wait_for(lambda: answers(f"127.0.0.1:{tracker.port}"))

    def running() -> bool:
        assert process.poll() is None, process.communicate()
        return True

    with held(driver.root) as stuck:
        process = driver.start(STEP_SECONDS, "--address", nodes.address, "--mlflow", tracker.uri, env=nodes.env)
        request.addfinalizer(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
        wait_for(lambda: running() and len(stuck()) == 2)  # however long a node takes for its first process

    # MLflow's server: nobody waits for it
    wait_for(lambda: running() and len(driver.ended()) >= 1)
    tracker.kill()
    ended = driver.ended()
    wait_for(lambda: running() and driver.ended() > ended)

    # a node, with everything on it: what it trained is trained again on the other, in the same command
    with held(driver.root) as stuck:
        wait_for(lambda: running() and stuck().keys() & set(session_of(other)))
        lost = {stuck()[pid] for pid in stuck().keys() & set(session_of(other))}
        nodes.kill(other)
        wait_for(lambda: running() and all((driver.root / "runs" / r / "record.json").exists() for r in lost))  # it has noticed
    wait_for(lambda: running() and lost & (driver.training_runs(driver.training()) | driver.ended()))

    # the head: the driver ends by itself, says so, and nobody trains on behind its back
    with held(driver.root) as stuck:
        wait_for(lambda: running() and stuck())
        nodes.kill(head)
        out, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "its process died" in out and "one more try" in out, out
    wait_for(lambda: not driver.training())
    assert driver.ended() < driver.expected, "there is something left to do"

    # the same command, on a Ray of its own this time
    process = driver.start(0.0, "--num-cpus", "1", "--mlflow", tracker.uri)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "nanoladder sync" in err
    records = driver.check_it_ended_well()
    assert sum(r.attempts > 1 for r in records) >= 1, "a run that lost its node says so"

    # MLflow's server comes back and is filled from the records
    tracker.start()
    wait_for(lambda: answers(f"127.0.0.1:{tracker.port}"))
    report = sync(Workspace(driver.root), mlflow_uri=tracker.uri)
    assert (report.num_runs, report.broken) == (len(driver.expected), ())
    assert tracker.num_children() == len(driver.expected)
