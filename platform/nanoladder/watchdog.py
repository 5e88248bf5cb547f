"""Says what is missing when a trial cannot be placed, instead of waiting for ever (as Ray does)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nanochat_model.errors import ConfigError

LOCAL_WAIT_SECONDS = 60.0  # on a cluster that does not grow
CLUSTER_WAIT_SECONDS = 900.0  # a cloud node takes minutes to come up: an assumption
PLACEMENT_ENV = "NANOLADDER_PLACEMENT_SECONDS"


def format_resources(resources: Mapping[str, float]) -> str:
    """`2 CPU, 1 GPU` without Ray's own markers (node addresses, memory in bytes)."""
    shown = {k: v for k, v in resources.items() if not k.startswith(("node:", "memory", "object_store", "accelerator_type"))}
    return ", ".join(f"{v:g} {k}" for k, v in sorted(shown.items())) or "nothing"


def check_fits(need: Mapping[str, float], have: Mapping[str, float], what: str) -> None:
    """ConfigError where the whole cluster, idle, could not hold `need`: names what is missing and what there is."""
    short = {k: v for k, v in need.items() if v > have.get(k, 0.0)}
    if short:
        missing = ", ".join(f"{v:g} {k} (the cluster has {have.get(k, 0.0):g})" for k, v in short.items())
        raise ConfigError(
            f"{what} needs {missing}; the cluster has {format_resources(have)}: ask for fewer devices, or give the --address "
            "of a larger cluster"
        )


class PlacementWatch:
    """Notes how long trials have waited while none ran; raises once it is too long."""

    def __init__(self, need: Mapping[str, float], what: str, wait_seconds: float) -> None:
        self._need, self._what, self._wait = dict(need), what, wait_seconds
        self._since: float | None = None

    def look(self, *, running: int, pending: int, available: Any = None) -> None:
        """`available` is called for the cluster's free resources only when the time is up."""
        if running or not pending:
            self._since = None
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > self._wait:
            free = available() if available is not None else {}
            raise ConfigError(
                f"{self._what} waited {self._wait:.0f} s for {format_resources(self._need)} and was not placed; free on the "
                f"cluster: {format_resources(free)}; end what holds the rest, or ask for less"
            )
