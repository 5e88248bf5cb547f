"""Runs generated Python code in a process of its own, with limits of time, memory, files and network.

What holds where (`SandboxResult.guards` says what was in force):
- everywhere: wall-clock limit with the whole process group killed, CPU time, address space (not on macOS), size of each file,
  number of open files, an empty working folder that is removed afterwards and looked at while the program runs (a program that
  fills it is killed), an empty environment, the standard library alone.
- Linux with seccomp (x86_64, aarch64): no sockets, no new processes, no signals to others, no change of their priority or
  processors, no memory that outlives the process, refused by the kernel.
- Linux with Landlock: no reading outside the interpreter and the working folder, no writing outside the latter, by the kernel.
- everywhere besides: an audit hook that refuses the same from within Python. Alone (macOS, old kernels) it stops code that does
  harm by mistake, not code that means to.

That a program has come to its end is said with a word that it is not given. One that searches its own interpreter for that word,
or that bends what its tests compare, can still call itself right: nothing inside one process can prevent that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHILD = Path(__file__).with_name("sandbox_child.py")
TIMEOUT_SECONDS = 5.0
MEMORY_BYTES = 512 << 20
FILE_BYTES = 4 << 20  # of each file
FOLDER_BYTES = 64 << 20  # of all files together
FOLDER_ENTRIES = 1000
LOOK_SECONDS = 0.05  # between two looks at the working folder
_TAIL_BYTES = 4000

Outcome = Literal["passed", "error", "timeout", "memory", "files", "ended early", "killed"]


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
    with _temporary_folder() as root:
        work = root / "work"
        work.mkdir()
        (work / "program.py").write_text(source, encoding="utf8", errors="replace")
        read_fd, write_fd = os.pipe()
        word = secrets.token_hex(16)
        limits = {
            "word": word,
            "memory_bytes": memory_bytes,
            "cpu_seconds": math.ceil(timeout_seconds) + 1,
            "file_bytes": file_bytes,
            "audit_hook": audit_hook,
            "status_fd": write_fd,
        }
        started = time.monotonic()
        with open(root / "out", "w+b") as out, open(root / "err", "w+b") as err:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(CHILD)],
                    cwd=work,
                    env={"PYTHONHASHSEED": "0", "TMPDIR": str(work)},
                    stdin=subprocess.PIPE,
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
            stopped = _run(process, json.dumps(limits).encode(), work, timeout_seconds)
            seconds = time.monotonic() - started
            with os.fdopen(read_fd, "rb") as status:
                said = status.read().decode("utf8", "replace").splitlines()
            output, errors = _tail(out), _tail(err)
    guards = tuple(json.loads(said[0])["guards"]) if said and said[0].startswith("{") else ()
    outcome = stopped or _outcome(process.returncode, said[-1:] == [word], errors)
    detail = errors.strip().splitlines()[-1] if errors.strip() else ""
    return SandboxResult(outcome=outcome, detail=detail, output=output, seconds=seconds, guards=guards)


def _run(process: subprocess.Popen[bytes], limits: bytes, work: Path, timeout_seconds: float) -> Literal["timeout", "files"] | None:
    """Hand over the limits, wait for the end or make one; returns why it was made."""
    deadline = time.monotonic() + timeout_seconds
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # a child that has ended already
            pipe.write(limits)
        while True:
            try:
                process.wait(max(0.0, min(LOOK_SECONDS, deadline - time.monotonic())))
                return None
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    return "timeout"
                if _is_full(work):
                    return "files"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it started, where the kernel did not forbid that
        process.wait()


def _is_full(work: Path) -> bool:
    """Whether the folder holds more than a program may write."""
    entries = size = 0
    folders = [os.fspath(work)]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_size
                    if entries > FOLDER_ENTRIES or size > FOLDER_BYTES:
                        return True
        except OSError as e:  # a folder that is just being removed, or closed to us: another look comes
            if e.errno == errno.ENAMETOOLONG:  # nested so deeply that nobody could look
                return True
    return False


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that is removed afterwards, however a program has left it: nested deeper than Python's stack, or closed."""
    root = Path(tempfile.mkdtemp(prefix="nanoladder-sandbox-"))
    try:
        yield root
    finally:
        with contextlib.suppress(OSError):
            _remove(root)


def _remove(root: Path) -> None:
    """Every folder is moved up to the top before it is looked into, so that no path gets long."""
    folders = [root]
    for folder in folders:  # grows meanwhile
        os.chmod(folder, 0o700)
        for entry in list(os.scandir(folder)):  # a list: in the first one entries change places
            if entry.is_dir(follow_symlinks=False):
                folders.append(root / f"{len(folders)}.d")
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, folders[-1])
            else:
                os.unlink(entry.path)
    for folder in reversed(folders):
        folder.rmdir()


def _tail(file: object) -> str:
    file.seek(0, os.SEEK_END)  # type: ignore[attr-defined]
    file.seek(max(0, file.tell() - _TAIL_BYTES))  # type: ignore[attr-defined]
    return str(file.read().decode("utf8", "replace"))  # type: ignore[attr-defined]


def _outcome(returncode: int, finished: bool, errors: str) -> Outcome:
    if returncode == -signal.SIGXCPU:
        return "timeout"
    if finished and returncode == 0:
        return "passed"
    if "MemoryError" in errors:
        return "memory"
    if returncode < 0:
        return "killed"
    return "ended early" if returncode == 0 or not errors.strip() else "error"
