"""Verdicts of a ladder's stage: adopt, reject or undecided, judged along steps, FLOPs and seconds from the stored curves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from nanochat_model.errors import ConfigError
from nanochat_model.identity import write_atomic
from nanochat_model.record import RunRecord
from nanoladder.facts_file import SCHEMA_VERSION, read_facts
from nanoladder.space import Times
from nanoladder.sweep import BASELINE, Sweep
from nanoladder.workspace import Workspace

PROMOTIONS_FILE = "promotions.json"
NOT_COMPARED = "not compared along steps, FLOPs and seconds"
MIN_POINTS = 2  # of a curve
EVALUATIONS = 12  # of a run, where none are asked for and curves are wanted
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One candidate at one stage. Gains are relative: log(baseline loss) − log(candidate loss), 0.01 is 1% better."""

    change: str
    overrides: dict[str, Any]
    stage: str
    verdict: Literal["adopt", "reject", "undecided"]
    gain: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    posterior: float | None = None
    n_seeds: int = 0  # pairs with the baseline
    runs_to_decide: int | None = None
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)  # steps, flops, seconds: gain, low, high, p_value …
    summary: str = ""  # what was gained on which axis
    reason: str = ""
    run_ids: tuple[str, ...] = ()
    baseline_run_ids: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge_stage(
    sweep: Sweep,
    records: Mapping[str, Mapping[int, RunRecord]],
    *,
    alpha: float = 0.05,
    min_gain: float = 0.0,
    noise: Any = None,
    before: Sequence[Promotion] = (),
    num_candidates: int = 0,
) -> list[Promotion]:
    """One Promotion a candidate. `records`: variant -> pair number -> complete run. `before`: verdicts of earlier stages.

    The test is made stricter for the number of candidates (Bonferroni; `num_candidates` where more were tried than are here). A
    candidate without a complete run is rejected: it cannot be trained. Raises ConfigError when the baseline has no complete run.
    """
    baseline = records[BASELINE]
    if not baseline:
        raise ConfigError(f"stage {sweep.stage}: no run of the {BASELINE} completed, so nothing can be judged; see its records")
    candidates = [name for name in sweep.variants if name != BASELINE]
    tried = num_candidates or len(candidates)
    return [_judge(sweep, name, baseline, records[name], tried, alpha, min_gain, noise, before) for name in candidates]


def judge_screened(
    sweep: Sweep,
    final: Sweep,
    screened: Mapping[str, Mapping[int, RunRecord]],
    finals: Mapping[str, Mapping[int, RunRecord]],
    *,
    alpha: float = 0.05,
    min_gain: float = 0.0,
    before: Sequence[Promotion] = (),
) -> list[Promotion]:
    """Verdicts of the candidates that did not reach the stage's final: one seed each, judged with the noise of all who did.
    Nothing is adopted on one seed."""
    from analysis.noise import SeedNoise

    logs = [[math.log(r.val_bpb) for r in runs.values() if r.val_bpb] for runs in finals.values()]
    spread = [(sum((v - fmean(x)) ** 2 for v in x), len(x) - 1) for x in logs if len(x) > 1]
    df = sum(n for _, n in spread)
    noise = SeedNoise(sd=math.sqrt(sum(s for s, _ in spread) / df), df=df) if df else None
    names = [name for name in sweep.variants if name not in final.variants]
    rest = replace(sweep, variants={BASELINE: {}, **{n: sweep.variants[n] for n in names}})
    judged = judge_stage(
        rest, screened, alpha=alpha, min_gain=min_gain, noise=noise, before=before, num_candidates=len(sweep.variants) - 1
    )
    place = f"not among the {len(final.variants) - 1} best of {len(sweep.variants) - 1} by the first seed"
    return [replace(p, verdict="undecided" if p.verdict == "adopt" else p.verdict, reason=f"{p.reason}; {place}") for p in judged]


def mean_gain(baseline: Mapping[int, RunRecord], runs: Mapping[int, RunRecord]) -> float:
    """Mean of log(baseline loss) − log(loss) over common pairs; −inf where there is none."""
    pairs = [(baseline[n].val_bpb, r.val_bpb) for n, r in runs.items() if n in baseline]
    gains = [math.log(b / c) for b, c in pairs if b and c]
    return fmean(gains) if gains else float("-inf")


def _judge(
    sweep: Sweep,
    name: str,
    baseline: Mapping[int, RunRecord],
    runs: Mapping[int, RunRecord],
    num_candidates: int,
    alpha: float,
    min_gain: float,
    noise: Any,
    before: Sequence[Promotion],
) -> Promotion:
    from analysis.compare import promotion_test

    overrides = {k: str(v) if isinstance(v, Times) else v for k, v in sweep.variants[name].items()}
    ids: dict[str, Any] = {
        "run_ids": tuple(r.run_id for r in runs.values()),
        "baseline_run_ids": tuple(r.run_id for r in baseline.values()),
    }
    if not runs:
        reason = "none of its runs completed"
        return Promotion(
            change=name, overrides=overrides, stage=sweep.stage, verdict="reject", gain=float("-inf"), reason=reason, **ids
        )
    losses = [{n: float(r.val_bpb) for n, r in side.items() if r.val_bpb is not None} for side in (baseline, runs)]
    test = promotion_test(losses[0], losses[1], noise=noise, alpha=alpha, min_gain=min_gain, num_candidates=num_candidates)
    axes, summary = _along_axes(baseline, runs, noise, alpha)
    return Promotion(
        change=name,
        overrides=overrides,
        stage=sweep.stage,
        verdict=test.verdict,
        gain=test.gain,
        low=test.low,
        high=test.high,
        p_value=test.p_value,
        posterior=test.posterior,
        n_seeds=test.num_pairs,
        runs_to_decide=test.runs_to_decide,
        axes=axes,
        summary=summary,
        reason=_with_history(test.message, name, sweep.stage, test.verdict, before),
        **ids,
    )


def _along_axes(
    baseline: Mapping[int, RunRecord], runs: Mapping[int, RunRecord], noise: Any, alpha: float
) -> tuple[dict[str, dict[str, Any]], str]:
    """Gains along steps, FLOPs and seconds, and in words what was gained on which. Of the runs that have a curve: where none has,
    what to do."""
    from analysis.compare import compare_recipes
    from analysis.errors import DataError

    ours, theirs = ({n: r for n, r in side.items() if len(r.curve) >= MIN_POINTS} for side in (baseline, runs))
    if not ours or not theirs:
        every = max(1, next(iter(runs.values())).config.num_steps // EVALUATIONS)
        advice = f'add overrides={{"eval.every_steps": {every}}} to the ladder (runs that are recorded stay as they are)'
        return {}, f"{NOT_COMPARED}: too few evaluations a run for a curve; {advice}"
    try:
        compared = compare_recipes(_curves(ours), _curves(theirs), noise=noise, alpha=alpha)
    except DataError as e:
        return {}, f"{NOT_COMPARED}: {e}"
    return {k: v.as_dict() for k, v in compared.axes.items()}, compared.summary


def _curves(runs: Mapping[int, RunRecord]) -> dict[int, np.ndarray]:
    """Pair number -> (points, 5): step, tokens, FLOPs, seconds, val_bpb."""
    return {
        n: np.array([[p.step, p.num_tokens, p.train_flops, p.seconds, p.val_bpb] for p in r.curve], dtype=float).reshape(-1, 5)
        for n, r in runs.items()
    }


def _with_history(message: str, name: str, stage: str, verdict: str, before: Sequence[Promotion]) -> str:
    won = [p.stage for p in before if p.change == name and p.verdict == "adopt"]
    if won and verdict == "reject":
        return f"{message}; it won at {', '.join(won)} and hurts at {stage}"
    if won and verdict == "undecided":
        return f"{message}; it won at {', '.join(won)}, which {stage} neither confirms nor refutes"
    return message


def rank_correlations(promotions: Sequence[Promotion]) -> list[dict[str, Any]]:
    """Spearman's correlation of the candidates' gains between consecutive stages, where three or more met at both."""
    from analysis.stage_ranks import stage_ranks

    return stage_ranks([{"change": p.change, "stage": p.stage, "gain": p.gain} for p in promotions])


def not_reached(stages: Sequence[str], goes_on: bool) -> dict[str, str]:
    """Stage -> why it has no verdicts, for the stages after the one just judged."""
    return {} if goes_on else dict.fromkeys(stages, "no candidate won the stage before")


def write_promotions(
    workspace: Workspace, ladder: str, question: str, promotions: Sequence[Promotion], skipped: Mapping[str, str]
) -> Path:
    path = workspace.sweep_dir(ladder) / PROMOTIONS_FILE
    rows = [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in p.as_dict().items()} for p in promotions]
    facts = {"schema_version": SCHEMA_VERSION, "ladder": ladder, "question": question, "promotions": rows}
    facts |= {"not_reached": dict(skipped), "rank_correlations": rank_correlations(promotions)}
    write_atomic(path, json.dumps(facts, indent=1))
    return path


def read_promotions(path: Path) -> list[dict[str, Any]]:
    """The verdicts of a ladder (its folder or promotions.json) as plain dicts, for the report."""
    path = path / PROMOTIONS_FILE if path.is_dir() else path
    return list(read_facts(path, "promotions", "run the ladder's command again")["promotions"])


def tag_verdicts(uri: str, artifacts: Path, sweep: Sweep, promotions: Sequence[Promotion]) -> None:
    """Write verdicts as tags into MLflow. As always with MLflow, a failure is said and changes nothing."""
    if not uri:
        return
    from nanoladder.tracking import MlflowWriter

    try:
        writer = MlflowWriter(uri, artifacts)
        writer.begin(sweep.name, {})
        for promotion in promotions:
            for run_id in promotion.run_ids:
                writer.tag(sweep.name, run_id, {"verdict": promotion.verdict})
        writer.end()
    except Exception as e:
        log.warning("MLflow at %s did not take the verdicts of %s (%s)", uri, sweep.name, type(e).__name__)
