"""Does a small model rank changes as a larger one does? Correlation of gains between the stages of a ladder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

MIN_CHANGES = 3  # two always agree or disagree wholly


def stage_ranks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{"ladder", "stages": [first, second], "n", "spearman"}] of consecutive stages at which three or more changes met.

    `rows`: one a change and stage, in the order of the stages: "change", "stage", "gain" (relative; None: not known) and, where
    there are several, "ladder". "spearman" is Spearman's rank correlation of the gains, None where all gains of a stage are alike.
    """
    gains: dict[str, dict[str, dict[str, float]]] = {}  # ladder -> stage -> change -> gain
    for row in rows:
        of_stage = gains.setdefault(str(row.get("ladder") or ""), {}).setdefault(str(row["stage"]), {})
        if row.get("gain") is not None and math.isfinite(row["gain"]):
            of_stage[str(row["change"])] = float(row["gain"])
    found = []
    for ladder, stages in gains.items():
        for (first, one), (second, other) in itertools.pairwise(stages.items()):
            common = [change for change in one if change in other]
            if len(common) < MIN_CHANGES:
                continue
            value = _spearman([one[c] for c in common], [other[c] for c in common])
            found.append({"ladder": ladder, "stages": [first, second], "n": len(common), "spearman": value})
    return found


def _spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    if len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(stats.spearmanr(one, other).statistic)
