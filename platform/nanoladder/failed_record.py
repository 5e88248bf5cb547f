"""The record of a run whose process could not write one itself."""

from __future__ import annotations

import datetime

from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.record import RunRecord
from nanoladder.trial_spec import TrialSpec


def failed_record(spec: TrialSpec, error: str, *, seconds: float) -> RunRecord:
    """A record with status "failed": what was to be run, and why it was not. Nothing in it is a result."""
    now = datetime.datetime.now(datetime.UTC)
    return RunRecord(
        run_id=spec.run_id,
        status="failed",
        name=spec.name,
        sweep=spec.sweep,
        stage=spec.stage,
        tags=spec.tags,
        config=spec.config,
        seed=spec.config.seed,
        params=count_params(spec.config.model).as_dict(),
        num_tokens=0,
        flops_per_token=flops_per_token(spec.config.model),
        train_flops=0.0,
        error=error,
        attempts=spec.attempts,
        backend=spec.backend,
        num_devices=spec.num_workers,
        started_at=(now - datetime.timedelta(seconds=seconds)).isoformat(timespec="seconds"),
        finished_at=now.isoformat(timespec="seconds"),
    )
