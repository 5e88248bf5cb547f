"""How well a share of right answers is known."""

from __future__ import annotations

import math


def accuracy_standard_error(accuracy: float, num: int) -> float:
    """Standard error of an accuracy over `num` problems, never 0: sqrt(p(1 − p)/m) with m = num + 4 and p = (right + 2)/m.

    Two right and two wrong answers are added, as in Agresti and Coull, "Approximate is better than 'exact' for interval estimation
    of binomial proportions", The American Statistician 52(2), 1998. The usual sqrt(accuracy(1 − accuracy)/num) says that nothing
    is uncertain where none, or all, of three problems were right; for many problems with some of both the two agree.
    """
    m = num + 4
    p = (accuracy * num + 2) / m
    return math.sqrt(p * (1 - p) / m)
