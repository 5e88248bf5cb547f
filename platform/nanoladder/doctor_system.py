"""Checks of what is around the devices: Python, memory, disk, shared memory, ports, token, clock."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanoladder.doctor import Finding, error, ok, warning
from nanoladder.submit import token_path

GB = 1e9
PACKAGES = ("torch", "ray", "optuna", "mlflow", "numpy")
DISK_ERROR_BYTES, DISK_WARNING_BYTES = 2 * GB, 20 * GB  # a checkpoint of d24 with its optimizer takes 15 GB
SHM_ERROR_BYTES, SHM_WARNING_BYTES = 128e6, 2 * GB  # Docker gives 64 MB unless told; Ray's object store lies there
MEMORY_WARNING_BYTES = 4 * GB
OPEN_FILES = 8192  # Ray asks for 65,536, and wants a few dozen a worker
RAY_PORTS = {6379: "GCS", 8265: "dashboard", 10001: "Ray client", 52365: "dashboard agent"}  # Ray's defaults
PUBLIC = ("00000000", "0" * 32)  # 0.0.0.0 and :: in /proc/net
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized
MAX_CLOCK_ERROR_SECONDS = 1.0


def python() -> Iterator[Finding]:
    """Versions, and whether `python` of a job is the Python that Ray runs in."""
    versions = {name: _version(name) for name in PACKAGES}
    missing = [name for name, version in versions.items() if not version]
    text = f"{sys.version.split()[0]} at {sys.executable}; " + ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    facts = {"python": sys.version.split()[0], "executable": sys.executable, **versions}
    if missing:
        remedy = "install everything as pinned: pip install -c constraints.txt -e '.[platform]'"
        yield error("python", f"{', '.join(missing)} not installed ({text})", remedy, **facts)
    else:
        yield ok("python", text, **facts)
    found = shutil.which("python")
    if found is None or not os.path.samefile(os.path.dirname(found), os.path.dirname(sys.executable)):
        yield warning(
            "python",
            f"`python` on the PATH is {found or 'nothing'}, not {sys.executable}: a job's entry point takes the former",
            "activate the environment before `ray start` (source .venv/bin/activate)",
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def memory() -> Iterator[Finding]:
    lines = Path("/proc/meminfo").read_text(encoding="utf8").splitlines()
    facts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, free = facts["MemTotal"], facts["MemAvailable"]
    cores = len(os.sched_getaffinity(0))
    text = f"{free / GB:.1f} of {total / GB:.1f} GB available, {cores} CPUs for this process of {os.cpu_count()}"
    if free < MEMORY_WARNING_BYTES:
        yield warning("memory", text, "end what holds it, or run fewer trials at a time (--max-concurrent)", free_bytes=free)
    else:
        yield ok("memory", text, free_bytes=free, total_bytes=total, num_cpus=cores)


def disk(storage: str = "") -> Iterator[Finding]:
    """Free space where results, Ray's temporary files and compile caches go, and whether they can be written."""
    from nanoladder.ray_init import default_temp_dir

    places = {"storage": storage or ".", "Ray's temporary files": str(default_temp_dir()), "temporary files": tempfile.gettempdir()}
    for what, given in places.items():
        if "://" in given:
            continue
        path = Path(given).expanduser().absolute()
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        text = f"{what} at {given}: {free / GB:.1f} GB free"
        if not os.access(path, os.W_OK):
            yield error("disk", f"{what} at {given}: {path} cannot be written", "give another folder, or mend its permissions")
        elif free < DISK_WARNING_BYTES:
            make = error if free < DISK_ERROR_BYTES else warning
            yield make("disk", text, "free some, or use a larger disk (--storage, NANOLADDER_RAY_DIR, TMPDIR)", free_bytes=free)
        else:
            yield ok("disk", text, free_bytes=free)


def shared_memory() -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield warning("shared memory", "no /dev/shm: Ray's object store goes to disk", "mount a tmpfs there")
        return
    usage = shutil.disk_usage(path)
    text = f"{usage.free / GB:.2f} of {usage.total / GB:.2f} GB free in /dev/shm"
    remedy = "give the container more: docker run --shm-size=8g (or --ipc=host)"
    if usage.free < SHM_WARNING_BYTES:
        make = error if usage.free < SHM_ERROR_BYTES else warning
        yield make("shared memory", text, remedy, free_bytes=usage.free)
    else:
        yield ok("shared memory", text, free_bytes=usage.free)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"up to {soft:,} open files (hard limit {hard:,})"
    if soft < OPEN_FILES and hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        yield warning("open files", text, "raise it: ulimit -n 65536, or LimitNOFILE of the service", limit=soft)
    else:
        yield ok("open files", text, limit=soft)


def ports() -> Iterator[Finding]:
    """Ports that Ray uses by default, as far as something listens there on more than the loopback."""
    listening = listening_ports()
    public = [p for p in RAY_PORTS if any(port == p and everywhere for port, everywhere in listening)]
    if 8265 in public:
        yield error(
            "ports",
            "the dashboard's port 8265 is open on every interface: whoever reaches it can run code here",
            "start Ray with --dashboard-host=127.0.0.1 and reach it through a tunnel (ray dashboard cluster.yaml)",
        )
    others = [p for p in public if p != 8265]
    if others:
        names = ", ".join(f"{p} ({RAY_PORTS[p]})" for p in others)
        yield warning(
            "ports",
            f"open on every interface: {names}",
            "Ray cannot bind them to the loopback: a firewall or private network must admit the cluster's own nodes only",
            ports=others,
        )
    if not public:
        used = sorted({port for port, _ in listening if port in RAY_PORTS})
        yield ok("ports", f"no default port of Ray is open to the outside (on the loopback: {used or 'none'})", ports=used)


def listening_ports() -> set[tuple[int, bool]]:
    """(port, whether on all interfaces) of every TCP socket that listens here."""
    found: set[tuple[int, bool]] = set()
    for name in ("tcp", "tcp6"):
        table = Path("/proc/net") / name
        for line in table.read_text(encoding="utf8").splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                address, _, port = fields[1].partition(":")
                found.add((int(port, 16), address in PUBLIC))
    return found


def token() -> Iterator[Finding]:
    """Whether Ray has a token, and nobody else can read it."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield ok("token", f"in the environment (RAY_AUTH_MODE {mode or 'not set'})")
        return
    if not path.is_file():
        remedy = "make one on this machine and copy it to every node: ray get-auth-token --generate, then chmod 600"
        make = error if mode == "token" else warning
        yield make("token", f"none at {path}; clusters started here take orders from anybody who reaches them", remedy)
        return
    bits = stat.S_IMODE(path.stat().st_mode)
    if bits & 0o077:
        yield error("token", f"{path} has mode {bits:04o}: other users of this machine can read it", f"chmod 600 {path}")
    elif mode != "token":
        yield warning(
            "token",
            f"{path} is private (0600), but RAY_AUTH_MODE is {mode or 'not set'}: `ray start` and `ray job submit` do without it",
            "export RAY_AUTH_MODE=token on every node and client",
        )
    else:
        yield ok("token", f"{path}, mode 0600, RAY_AUTH_MODE=token")


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), up to the fields read here; the rest is room."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("room", ctypes.c_char * 256),
    ]


def clock() -> Iterator[Finding]:
    """Whether the kernel's clock is kept in step. Records, tokens and logs of several nodes are compared by time."""
    timex = _Timex()
    state = ctypes.CDLL("libc.so.6", use_errno=True).adjtimex(ctypes.byref(timex))
    if state < 0:
        yield warning("clock", "its state cannot be read here", "make sure that the host runs chrony or systemd-timesyncd")
    elif state == TIME_ERROR or timex.maxerror > MAX_CLOCK_ERROR_SECONDS * 1e6:
        yield warning("clock", "not synchronized, says the kernel", "run chrony or systemd-timesyncd on the host")
    else:
        yield ok("clock", f"synchronized to within {timex.maxerror / 1e3:.0f} ms", max_error_ms=timex.maxerror / 1e3)
