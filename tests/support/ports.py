"""Ports for servers that are told a number and bind it seconds later, or again after they were killed."""

from __future__ import annotations

import os
import random
import socket

LOOPBACK = "127.0.0.1"
# A port that the system gives for 0 is anybody's again as soon as it is closed: Linux takes those above 32768 for all who ask for
# any port and for every connection that is made, and Ray asks for dozens. `ray start` gives its workers 10002 to 19999.
RANGE = range(20_000, 32_000)
_given: set[int] = set()


def free_port() -> int:
    """A port of loopback that nobody listens at, and that no other test is given."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    mine = RANGE[int(worker.removeprefix("gw")) :: int(workers)]
    while True:
        port = random.SystemRandom().choice(mine)
        with socket.socket() as s:
            try:
                s.bind((LOOPBACK, port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port


def free_ports(number: int) -> list[int]:
    return [free_port() for _ in range(number)]
