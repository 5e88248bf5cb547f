"""Ray nodes on this machine, each in a session of its own, so that one can be killed whole, as a power cut would."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ports import LOOPBACK, free_port

# Ray waits a minute for a head that is gone, and looks for a node that is gone every few seconds: tests need not. A node that was
# killed refuses the connection at once; one that merely takes its time, on a machine with much to do, is given Ray's usual 10 s.
FAST = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# What Ray and MLflow do by themselves where a machine is slow, or busy with something else: give up starting a node or a process
# after 30 or 60 s and a call after 10, and kill trials where others fill the memory.
PATIENT = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_memory_monitor_refresh_ms": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "120",
}
# Of several nodes on one machine: each would give its workers the ports from 10002 upwards, and so would somebody else's.
ANY_WORKER_PORT = ("--min-worker-port=0", "--max-worker-port=0")


class RayNodes:
    """A head and its nodes; `env` is what a driver needs to join them."""

    def __init__(self, *, support: Path, **env: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nlr-", dir="/tmp"))  # short: Unix sockets lie in it
        self.env = {
            **os.environ,
            **FAST,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": os.pathsep.join([str(support), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self.env |= env
        self.env.pop("RAY_ADDRESS", None)
        self.address = f"{LOOPBACK}:{free_port()}"
        self._started: list[subprocess.Popen[bytes]] = []

    def start_head(self, *, num_cpus: int = 1, num_gpus: int = 0) -> int:
        port = self.address.split(":")[1]
        node = ["--head", f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        return self._start([*node, f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"], "head")

    def start_node(self, *, num_cpus: int = 1, num_gpus: int = 0) -> int:
        return self._start([f"--address={self.address}", f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"], "node")

    def _start(self, arguments: list[str], kind: str) -> int:
        temp = [f"--temp-dir={self.folder}"] if kind == "head" else []
        command = [str(Path(sys.executable).parent / "ray"), "start", *arguments, *temp]
        path = self.folder / f"{kind}-{len(self._started)}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [*command, f"--node-ip-address={LOOPBACK}", "--object-store-memory=100000000", *ANY_WORKER_PORT, "--block"],
                env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)

        def has_started() -> bool:
            said = path.read_text(errors="replace")
            assert process.poll() is None, f"the {kind} did not start: {said}"
            return "Ray runtime started" in said

        wait_for(has_started)  # a sweep that starts before a node has joined plans without it
        return process.pid

    def kill(self, node: int) -> None:
        """SIGKILL to every process of a node at once; it is dead when this returns.

        A process takes its time to die: one that seemed to train on would be taken for the run's next attempt.
        """

        def is_dead() -> bool:
            for pid in (pids := session_of(node)):
                kill_process(pid)
            return not pids

        wait_for(is_dead)
        for process in self._started:
            if process.pid == node:
                process.wait()

    def close(self) -> None:
        for process in self._started:
            self.kill(process.pid)
        shutil.rmtree(self.folder, ignore_errors=True)


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def answers(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex((host, int(port))) == 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def session_of(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def wait_for(what: Callable[[], object], seconds: float = 240.0, *, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(every)
