"""What holds for all tests."""

from __future__ import annotations

import os
import signal

import pytest
from ray_nodes import PATIENT

# What would send tests to somebody's cluster, storage or tracking server.
NOT_OURS = (
    "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_SUBMIT_HOOK", "NANOLADDER_STORAGE", "NANOLADDER_LOCAL",
    "MLFLOW_TRACKING_URI", "HF_ENDPOINT", "AWS_ENDPOINT_URL",
)  # fmt: skip

# One thread a process is what trials get; libraries must not start more behind our back. Set before any of them is imported.
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")


def pytest_configure() -> None:
    for name in NOT_OURS:
        os.environ.pop(name, None)
    os.environ.update(PATIENT)
    # Sockets lie in it, so it is short, whatever TMPDIR is.
    os.environ.setdefault("NANOLADDER_RAY_DIR", f"/tmp/nanoladder-ray-{os.getuid()}")
    # A shell that starts the tests in the background has SIGINT ignored, and the programs that tests interrupt would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that last long, by their marker `seconds`, come first: the processes that files are dealt out to then end together."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("seconds")), default=0))
