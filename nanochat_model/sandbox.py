"""Runs generated Python code in a process of its own, with limits of time, memory, files and network.

What holds where (`SandboxResult.guards` says what was in force):
- everywhere: wall-clock limit with the whole process group killed, CPU time, address space (not on macOS), size of each file and
  number of open files, an empty working folder that is removed afterwards, an empty environment, the standard library alone.
- Linux with seccomp (x86_64, aarch64): no sockets, no new processes, no signals to others, refused by the kernel.
- Linux with Landlock: no reading outside the interpreter and the working folder, no writing outside the latter, by the kernel.
- everywhere besides: an audit hook that refuses the same from within Python. Alone (macOS, old kernels) it stops code that does
  harm by mistake, not code that means to. The number of files in the working folder is bounded by time only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHILD = Path(__file__).with_name("sandbox_child.py")
TIMEOUT_SECONDS = 5.0
MEMORY_BYTES = 512 << 20
FILE_BYTES = 4 << 20
_TAIL_BYTES = 4000

Outcome = Literal["passed", "error", "timeout", "memory", "ended early", "killed"]


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """How a program ended. Only a program that runs to its end without an exception has passed; one that exits before has not."""

    outcome: Outcome
    detail: str  # last line that it wrote to stderr
    output: str  # end of what it wrote to stdout
    seconds: float
    guards: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run_program(
    source: str,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    memory_bytes: int = MEMORY_BYTES,
    file_bytes: int = FILE_BYTES,
    audit_hook: bool = True,
) -> SandboxResult:
    """Run `source` and say how it ended. `audit_hook` False leaves the kernel's guards alone, to see what they hold by themselves.
    Raises OSError only when no process can be started at all."""
    with tempfile.TemporaryDirectory(prefix="nanoladder-sandbox-", ignore_cleanup_errors=True) as root:
        work = Path(root) / "work"
        work.mkdir()
        (work / "program.py").write_text(source, encoding="utf8", errors="replace")
        read_fd, write_fd = os.pipe()
        limits = {
            "memory_bytes": memory_bytes,
            "cpu_seconds": math.ceil(timeout_seconds) + 1,
            "file_bytes": file_bytes,
            "audit_hook": audit_hook,
            "status_fd": write_fd,
        }
        started = time.monotonic()
        with open(Path(root) / "out", "w+b") as out, open(Path(root) / "err", "w+b") as err:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(CHILD), json.dumps(limits)],
                    cwd=work,
                    env={"PYTHONHASHSEED": "0", "TMPDIR": str(work)},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    pass_fds=(write_fd,),
                    start_new_session=True,
                )
            except OSError:
                os.close(read_fd)
                raise
            finally:
                os.close(write_fd)
            timed_out = _wait(process, timeout_seconds)
            seconds = time.monotonic() - started
            with os.fdopen(read_fd, "rb") as status:
                said = status.read().decode("utf8", "replace").splitlines()
            output, errors = _tail(out), _tail(err)
    guards = tuple(json.loads(said[0])["guards"]) if said and said[0].startswith("{") else ()
    outcome = _outcome(process.returncode, timed_out, said[-1:] == ["finished"], errors)
    detail = errors.strip().splitlines()[-1] if errors.strip() else ""
    return SandboxResult(outcome=outcome, detail=detail, output=output, seconds=seconds, guards=guards)


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    """Wait for the end, or make one; returns whether the time was up."""
    timed_out = False
    try:
        process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it started, where the kernel did not forbid that
        process.wait()
    return timed_out


def _tail(file: object) -> str:
    file.seek(0, os.SEEK_END)  # type: ignore[attr-defined]
    file.seek(max(0, file.tell() - _TAIL_BYTES))  # type: ignore[attr-defined]
    return str(file.read().decode("utf8", "replace"))  # type: ignore[attr-defined]


def _outcome(returncode: int, timed_out: bool, finished: bool, errors: str) -> Outcome:
    if timed_out or returncode == -signal.SIGXCPU:
        return "timeout"
    if finished and returncode == 0:
        return "passed"
    if "MemoryError" in errors:
        return "memory"
    if returncode < 0:
        return "killed"
    return "ended early" if returncode == 0 or not errors.strip() else "error"
