"""Compiles kernels.c for this machine once and loads it through ctypes.

The library is cached under the user's cache folder by a hash of source, flags, compiler and CPU, so processes after the first
load it in a millisecond. It must be loaded after torch: its OpenMP runtime is then the one that torch uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("kernels", "embed", "gates", "vectors", "rotary", "attention", "products", "cross_entropy", "muon", "norms")
SOURCES = ("kernels.c", *(f"{part}.inc" for part in PARTS))
FLAGS = ("-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
MACHINE_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())  # the first that compiles
SWITCH = "NANOLADDER_NATIVE"  # 0: pure PyTorch on CPUs as well
COMPILE_SECONDS = 120


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be compiled (one line on stderr says so)."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = next(
        (path for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None
    )
    if compiler is None:
        _tell("no C compiler found (CC, cc, gcc or clang)")
        return None
    try:
        return ctypes.CDLL(str(_library(compiler)))
    except (OSError, subprocess.SubprocessError) as e:
        _tell(f"{compiler}: {e}")
        return None


def native_status() -> str:
    """One word for records and start-up lines."""
    return "native" if kernels() is not None else "pytorch"


def _tell(reason: str) -> None:
    print(f"CPU kernels not compiled: {reason}; pure PyTorch runs instead, about half as fast on small models", file=sys.stderr)


def _library(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True).stdout
    parts = [version, _cpu(), repr(FLAGS), *((HERE / s).read_text(encoding="utf8") for s in SOURCES)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoladder" / "kernels"
    path = folder / f"kernels-{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: every process compiles for itself
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # nobody did while this process waited
                _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    """Compile into a temporary file and move it into place: nobody ever loads a part."""
    message = ""
    for machine in MACHINE_FLAGS:
        fd, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(fd)
        command = [compiler, *FLAGS, *machine, "-o", temporary, str(HERE / SOURCES[0]), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if result.returncode == 0:
            os.replace(temporary, path)
            return
        Path(temporary).unlink(missing_ok=True)
        message = result.stderr.strip().splitlines()[0] if result.stderr.strip() else f"exit status {result.returncode}"
    raise OSError(message)


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    except OSError:
        return platform.processor() or platform.machine()
