"""Where a command runs and where its results may lie: at a shell, or as a Ray job in a copy of the code that Ray throws away."""

from __future__ import annotations

import os
from pathlib import Path

from nanochat_model.errors import ConfigError

STORAGE_ENV = "NANOLADDER_STORAGE"  # default of --storage; the cluster files set it on the head
DEFAULT_STORAGE = "runs"
JOB_COPY = "runtime_resources"  # in a Ray session's folder: copies of shipped working directories, removed when unused
JOB_CONFIG_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entry point of a submitted job


def default_storage() -> str:
    """NANOLADDER_STORAGE, else `runs` in the current folder."""
    return os.environ.get(STORAGE_ENV) or DEFAULT_STORAGE


def inside_job() -> bool:
    """Whether this process was started by Ray for a submitted job."""
    return JOB_CONFIG_ENV in os.environ


def check_lasting(storage: str | Path) -> None:
    """ConfigError where `storage` would lie in the copy of the code that Ray made for this job: it would vanish with it."""
    if "://" in str(storage):
        return
    path = Path(storage).expanduser().absolute()
    if inside_job() and JOB_COPY in path.parts:
        raise ConfigError(
            f"storage {str(storage)!r} lies in Ray's own copy of the code ({path}), which is removed after the job; give "
            f"--storage with a full path that every node sees, say /shared/runs, or set {STORAGE_ENV} where Ray is started"
        )
