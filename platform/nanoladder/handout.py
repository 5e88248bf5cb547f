"""Whether there is room for one more run: the rule by which runs are given out, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

# Trials that Ray Tune may have waiting for a place or a process. Its own limit for a searcher like ours is 1: processes of a fleet
# then start one after another, and an autoscaler sees one trial at a time. 200 is its limit for lists of trials known beforehand.
MAX_PENDING = 200


Labels: TypeAlias = Mapping[str, str]
NO_LABEL: Labels = {}


class Room:
    """What the runs in flight have been promised. Runs are given out only while the cluster holds all workers of all of them,
    so that several trials of several devices never wait for each other half placed."""

    def __init__(self, max_concurrent: int | None = None) -> None:
        self._max_concurrent = max_concurrent
        self._used: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}  # by the labels that nodes must carry
        self.in_flight = 0

    @property
    def full(self) -> bool:
        """Whether as many runs are in flight as may be."""
        return self._max_concurrent is not None and self.in_flight >= self._max_concurrent

    def fits(self, need: Mapping[str, float], capacity: Mapping[str, float] | None, labels: Labels = NO_LABEL) -> bool:
        """Whether `need` fits beside what is in flight. The first always does: that the cluster cannot hold it is for the
        watchdog to say. `capacity` (of the nodes with these `labels`) None: nodes may be added, everything fits."""
        if capacity is None or not self.in_flight:
            return True
        of = [self._used.get(_key(labels), {})] if labels else self._used.values()  # what asks for no label may be anywhere
        return all(sum(used.get(k, 0.0) for used in of) + need[k] <= capacity.get(k, 0.0) + 1e-6 for k in need)

    def take(self, need: Mapping[str, float], labels: Labels = NO_LABEL) -> None:
        self.in_flight += 1
        used = self._used.setdefault(_key(labels), {})
        for key, value in need.items():
            used[key] = used.get(key, 0.0) + value

    def give_back(self, need: Mapping[str, float], labels: Labels = NO_LABEL) -> None:
        self.in_flight -= 1
        for key, value in need.items():
            self._used[_key(labels)][key] -= value


def _key(labels: Labels) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))
