"""A Ray head of our own on free ports, with token authentication, whose Python has everything but this project installed.

What runs on it finds nanoladder only if it was shipped there. Its processes are ended one by one: nobody else's Ray is touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from ports import LOOPBACK, free_ports
from ray_nodes import ANY_WORKER_PORT, PATIENT

START_SECONDS = 300.0
OTHER_PORTS = (
    "node-manager", "object-manager", "ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent",
)  # fmt: skip


class PrivateCluster:
    """`env` is what a client's process needs, `url` the dashboard's address, `python` the cluster's interpreter."""

    def __init__(self, head_env: dict[str, str] | None = None, *, num_cpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nl-", dir="/tmp"))  # short: Unix sockets lie in it
        self.num_cpus = num_cpus
        self.python = make_python(self.folder / "env")
        self.token_file = self.folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self.port, self.dashboard_port, self.metrics_port, *self._others = free_ports(3 + len(OTHER_PORTS))
        self.url = f"http://{LOOPBACK}:{self.dashboard_port}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON", "NANOLADDER_"))}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file), "RAY_USAGE_STATS_ENABLED": "0"}
        self.env = clean | token | PATIENT
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        self._head_env = self.env | {"PATH": path, "OMP_NUM_THREADS": "1"} | (head_env or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> PrivateCluster:
        ports = [f"--{name}-port={port}" for name, port in zip(OTHER_PORTS, self._others, strict=True)]
        ports.append(f"--metrics-export-port={self.metrics_port}")
        where = [f"--port={self.port}", f"--dashboard-port={self.dashboard_port}", *ports, *ANY_WORKER_PORT]
        size = [f"--num-cpus={self.num_cpus}", f"--object-store-memory={100 * 2**20}", f"--temp-dir={self.folder / 't'}"]
        command = [self.python, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--node-ip-address={LOOPBACK}"]
        command += ["--dashboard-host", LOOPBACK, "--include-dashboard=true", "--labels", "gpu=none", *where, *size]
        with (self.folder / "start.log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(c) for c in command], env=self._head_env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            said = (self.folder / "start.log").read_text()
            assert self._process.poll() is None and time.monotonic() < deadline, f"the head did not start: {said}"
            time.sleep(0.2)
        return self

    def _answers(self) -> bool:
        token = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        request = urllib.request.Request(f"{self.url}/api/jobs/", headers=token)
        try:
            with urllib.request.urlopen(request, timeout=2) as reply:
                return bool(reply.status == 200)
        except (OSError, HTTPException):  # an answer that is cut off
            return False

    def stop(self) -> None:
        while self._pids():
            for pid in self._pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        if self._process is not None:
            self._process.wait(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pids(self) -> list[int]:
        """Processes that live in our folder: by their command line or their environment."""
        mine, found = os.fsencode(self.folder) + b"/", []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mine in (entry / "cmdline").read_bytes() or mine in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found


def clean_environment() -> dict[str, str]:
    """Ours without PYTHONPATH: other tests of this process may have put this repository on it."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def make_python(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but none of the `.pth` files through which ours is installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    found = subprocess.run(
        [str(python), "-c", "import ray, nanoladder"], capture_output=True, text=True, cwd=folder, env=clean_environment()
    )
    assert "No module named 'nanoladder'" in found.stderr, f"nanoladder must not be installed here, ray must: {found.stderr}"
    return python
