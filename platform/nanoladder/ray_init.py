"""Start a Ray of our own on this machine, or join the one that was named. Never another by accident.

Without an address (argument or RAY_ADDRESS) a private cluster is started and ended with this process; several may live on
one machine side by side. Its temporary files lie in one folder of ours and are removed after use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import stat
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_model.errors import ConfigError
from nanoladder.handout import MAX_PENDING
from nanoladder.job_context import JOB_CONFIG_ENV
from nanoladder.run_lock import exclusive, remove_abandoned

PACKAGES = ("nanoladder", "nanochat_model", "analysis")
OBJECT_STORE_BYTES = 200 * 2**20  # nothing large goes through Ray's object store
SOCKET_PATH_LIMIT = 107  # bytes of a Unix socket's path (sockaddr_un)
SOCKET_SUFFIX = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
TEMP_DIR_ENV = "NANOLADDER_RAY_DIR"

# Read by Ray when a driver, controller or worker starts. Health checks of 2 s would make each ray.train.report wait as long;
# Train would move workers into scratch folders, where relative paths break; Tune's own loggers keep every result in memory
# and its snapshots serve a restore that is not used here, records being the truth.
SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_MAX_PENDING_TRIALS_PG": str(MAX_PENDING),
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

# Of a cluster of our own: no node of it is ever taken away, so no process of each run needs to watch for that.
LOCAL_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

# Of such a cluster too, but read when `ray` is imported: Ray gives itself up where its node and its helpers are not there in 30 s,
# a process in 60. From a cold shared disk, or beside other work, their imports alone take longer.
PATIENCE = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
}


@dataclass(frozen=True, kw_only=True)
class RaySession:
    """The Ray this process is connected to. `started_here`: it is ours and ends with us."""

    address: str
    started_here: bool
    dashboard_url: str
    session_dir: str
    num_cpus: float
    num_gpus: float


_session: RaySession | None = None
_held = contextlib.ExitStack()  # the lock of a session that was started here


def ensure_ray(
    workspace: Any = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    address: str | None = None,
    temp_dir: str | Path | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
) -> RaySession:
    """Connect once; further calls return the same session.

    `address`: of a cluster to join ("auto" for the one that runs on this machine); default RAY_ADDRESS, else a new private
    one with `num_cpus` CPUs (default: those this process may use). `temp_dir` (or NANOLADDER_RAY_DIR) must be short: Unix
    sockets lie in it. Raises ConfigError where the address cannot be reached or the folder is too long.
    """
    global _session
    address = address or os.environ.get("RAY_ADDRESS") or ""
    is_local = address in ("", "local")
    for name, value in {**SETTINGS, **(PATIENCE if is_local else {})}.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        if _session is None:
            _session = _describe(started_here=False)
        return _session
    logging.getLogger("ray").setLevel(logging.ERROR)
    if is_local:
        _start_local(num_cpus, num_gpus, temp_dir, object_store_bytes)
        _session = _describe(started_here=True)
        _held.enter_context(exclusive(Path(_session.session_dir), "this Ray session"))
    else:
        check_address(address)
        _join(address)
        _session = _describe(started_here=False)
    return _session


def shutdown_ray() -> None:
    """Leave the cluster; one that was started here ends, and its temporary files go."""
    global _session
    import ray

    session, _session = _session, None
    if not ray.is_initialized():
        return
    ray.shutdown()
    if session is not None and session.started_here and session.session_dir:
        shutil.rmtree(session.session_dir, ignore_errors=True)
        _held.close()


def default_temp_dir() -> Path:
    """NANOLADDER_RAY_DIR, else a folder of this user under the system's temporary folder."""
    given = os.environ.get(TEMP_DIR_ENV)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"nanoladder-ray-{os.getuid()}"


def _start_local(num_cpus: int | None, num_gpus: int | None, temp_dir: str | Path | None, object_store_bytes: int) -> None:
    import ray

    folder = check_temp_dir(Path(temp_dir) if temp_dir else default_temp_dir())
    remove_abandoned(folder.glob("session_*"))
    secure_token_file()
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    paths = code_paths()
    if paths:  # local workers inherit this process's environment
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=num_cpus or len(os.sched_getaffinity(0)),
        num_gpus=num_gpus,
        include_dashboard=True,  # without it Train never frees the resources of a run whose controller died
        dashboard_host="127.0.0.1",
        object_store_memory=object_store_bytes,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder),
    )


def check_address(address: str) -> None:
    """ConfigError for a dashboard's URL, which takes jobs but no drivers."""
    if address.startswith(("http://", "https://")) and JOB_CONFIG_ENV not in os.environ:
        raise ConfigError(
            f"{address} is a dashboard, which takes jobs: use nanoladder submit FILE --address {address}; a sweep that is started "
            "on the cluster itself joins with --address auto (or its head's host:6379)"
        )


def _join(address: str) -> None:
    import ray

    try:
        ray.init(
            address=None if JOB_CONFIG_ENV in os.environ else address,
            runtime_env=runtime_env(os.environ.get(JOB_CONFIG_ENV)),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, TimeoutError) as e:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({e}); start one with `ray start --head`, or leave out the address"
        ) from None


def _describe(*, started_here: bool) -> RaySession:
    import ray

    node = ray._private.worker._global_node
    resources = ray.cluster_resources()
    return RaySession(
        address=ray.get_runtime_context().gcs_address,
        started_here=started_here,
        dashboard_url=ray._private.worker.get_dashboard_url() or "",
        session_dir=node.get_session_dir_path() if node is not None else "",
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
    )


def check_temp_dir(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    limit = SOCKET_PATH_LIMIT - SOCKET_SUFFIX
    if len(os.fsencode(folder)) > limit:
        raise ConfigError(
            f"Ray's temporary folder {folder} has {len(os.fsencode(folder))} bytes, more than the {limit} that its sockets "
            f"allow; set {TEMP_DIR_ENV} to a shorter one, say /tmp/r"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def secure_token_file() -> None:
    """Make sure that Ray finds a token which nobody else can read (Ray itself writes it with mode 0644).

    Without a writable home the token is only in this process's environment, which its local cluster inherits.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path(os.environ.get("HOME") or "/nonexistent") / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _create_token(path)
        elif stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _create_token(path: Path) -> None:
    """Written beside and linked into place: whoever comes first wins, and nobody sees a part."""
    fd, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "w") as f:
            f.write(secrets.token_hex(32))
        os.link(name, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(name)


def package_dirs() -> list[Path]:
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, f"package {package} is not importable"
        found.append(Path(spec.origin).parent)
    return found


def code_paths() -> list[str]:
    """Folders that hold our packages, where they are not installed as files of this environment."""
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return list(dict.fromkeys(str(d.parent) for d in package_dirs() if str(d.parent) not in installed))


def runtime_env(job_config: str | None = None) -> dict[str, Any]:
    """What the workers of a cluster need to run our code: the packages' source and the settings above.

    Inside a submitted job (`job_config` is its JSON) what the job already brings is left out: Ray refuses to merge twins.
    """
    given = (json.loads(job_config).get("runtime_env") or {}) if job_config else {}
    env: dict[str, Any] = {"env_vars": {k: v for k, v in SETTINGS.items() if k not in given.get("env_vars", {})}}
    brings_code = "py_modules" in given or "PYTHONPATH" in given.get("env_vars", {})
    if not brings_code:
        env["py_modules"] = [str(d) for d in package_dirs()]
    if "excludes" not in given and not brings_code:
        env["excludes"] = ["**/__pycache__"]
    return env
