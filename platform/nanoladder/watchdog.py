"""Says what is missing when a trial cannot be placed, instead of waiting for ever (as Ray does)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from nanochat_model.errors import ConfigError

LOCAL_WAIT_SECONDS = 300.0  # on a cluster that does not grow: a process that imports from a slow disk takes its minutes
CLUSTER_WAIT_SECONDS = 900.0  # a cloud node takes minutes to come up: an assumption
PLACEMENT_ENV = "NANOLADDER_PLACEMENT_SECONDS"


def placement_wait(*, started_here: bool) -> float:
    """How long a trial may wait for its place: NANOLADDER_PLACEMENT_SECONDS, else by whether the cluster may grow."""
    given = os.environ.get(PLACEMENT_ENV)
    if not given:
        return LOCAL_WAIT_SECONDS if started_here else CLUSTER_WAIT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"{PLACEMENT_ENV}={given!r} must be a positive number of seconds; unset it for the usual ones")
    return seconds


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

    def __init__(self, need: Mapping[str, float], labels: Mapping[str, str], what: str, wait_seconds: float) -> None:
        self._need, self._labels, self._what, self._wait = dict(need), dict(labels), what, wait_seconds
        self._since: float | None = None

    def look(
        self,
        *,
        running: int,
        pending: int,
        have: Callable[[Mapping[str, str]], Mapping[str, float]],
        free: Callable[[], Mapping[str, float]],
    ) -> None:
        """`have`: all resources of the nodes that carry given labels, `free`: the cluster's unused ones; asked for only when the
        time is up."""
        if running or not pending:
            self._since = None
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > self._wait:
            raise ConfigError(
                not_placed(f"{self._what} waited {self._wait:.0f} s", self._need, self._labels, have(self._labels), free())
            )


def not_placed(
    waited: str, need: Mapping[str, float], labels: Mapping[str, str], have: Mapping[str, float], free: Mapping[str, float]
) -> str:
    """What a trial asked for, what of that is missing, and what the cluster has."""
    short = {k: v - free.get(k, 0.0) for k, v in need.items() if v > free.get(k, 0.0)}
    on = f" on nodes labelled {', '.join(f'{k}={v}' for k, v in labels.items())}" if labels else ""
    missing = f"{format_resources(short)} short" if short else "enough in all, but not together on one such node"
    return (
        f"{waited} for {format_resources(need)}{on} and was not placed: the cluster has {format_resources(have)}, free "
        f"{format_resources(free)}, {missing}; end what holds the rest, add nodes, ask for less, or wait longer ({PLACEMENT_ENV})"
    )
