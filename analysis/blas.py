"""One BLAS thread for small matrix products.

A product of a few hundred rows gains nothing from several threads, and on a busy machine OpenBLAS's threads wait for each other at
every call: a fit of 0.3 s was seen to take 15-30 s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
T = TypeVar("T")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through the loaded libraries once, a few milliseconds


def single_blas_thread(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` with BLAS held to one thread; what it was before is restored."""

    @wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        with _controller().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited
