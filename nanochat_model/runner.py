"""The pretraining loop: steps, and between them evaluation, checkpoints, reports and the decision to stop."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, Literal

from nanochat_model import diagnostics
from nanochat_model.callbacks import Callbacks, StepInfo
from nanochat_model.checkpoint import CHECKPOINTS_DIR, CheckpointState, capture_rng, copy_tokenizer, save_checkpoint, step_dir
from nanochat_model.distributed import all_max, broadcast, first_text, on_main
from nanochat_model.evaluate import evaluate_bpb
from nanochat_model.identity import run_id
from nanochat_model.loop import FrozenGarbage, Multipliers, frozen_garbage
from nanochat_model.progress import GIVE_UP_STEPS, Progress
from nanochat_model.record import Status
from nanochat_model.resume import multipliers_at
from nanochat_model.session import Session
from nanochat_model.step_shares import is_low, likely_cause
from nanochat_model.step_times import timed_step

SETTLED_STEPS = 20  # steps after which compilation and warm-up no longer weigh on the rate
_log = logging.getLogger(__name__)


class TrainingFailed(Exception):
    """The run cannot go on; the message goes into its record."""


class Runner:
    """Drives one session from `progress.step` to the end. All ranks run it in lockstep."""

    def __init__(
        self,
        session: Session,
        progress: Progress,
        callbacks: Callbacks,
        *,
        run_dir: Path,
        parents: dict[str, str],
        kind: Literal["base", "sft"] = "base",
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.session = session
        self.config = session.config
        self.runtime = session.runtime
        self.ranks = session.ranks
        self.progress = progress
        self.callbacks = callbacks
        self.run_dir = run_dir
        self.parents = parents
        self.kind: Literal["base", "sft"] = kind
        self.extra = extra or {}  # what state.json keeps beyond pretraining's fields
        self._explained = False  # whether it was said why MFU is low
        self._saved_step = progress.step  # of the newest checkpoint: the one resumed from, or none worth writing at 0
        self._saved_at = time.monotonic()

    def run(self, start_step: int) -> tuple[Status, str | None]:
        """Train to the end. Returns the status and its reason. Raises TrainingFailed when values stay non-finite."""
        self.callbacks.call("on_start", self.config, start_step)
        stopped = self._stop_agreed()
        with frozen_garbage() as garbage:
            while not stopped and self.progress.step < self.config.num_steps:
                stopped = self._one_step(garbage)
        self.progress.clock.stop()
        if not stopped:
            self._evaluate_if(self.progress.val_bpb is None)
            if self.runtime.core_bundle and self.progress.core is None:
                self._evaluate_core()
        self._save_if(self.progress.step > self._saved_step)
        return ("stopped", self.callbacks.stop_reason) if stopped else ("complete", None)

    def _one_step(self, garbage: FrozenGarbage) -> bool:
        """One update and whatever is due after it. Returns whether to stop."""
        p = self.progress
        p.clock.start()
        at = p.step
        multipliers = multipliers_at(self.config, at)
        metrics: dict[str, float] = {}
        seconds: dict[str, float] = {}
        if _due(at + 1, self.runtime.diagnostics_every_steps):
            metrics, seconds, outcome = diagnostics.measured_step(self.session.stepper, self.session.batch, at, multipliers)
        elif p.times.due(p.steps_here):
            seconds, outcome = timed_step(self.session.stepper, self.session.batch, at, multipliers)
        else:
            outcome = self.session.stepper.step(self.session.batch(at), multipliers)
        p.times.add(seconds)
        p.after_step(outcome.loss, skipped=outcome.skipped, empty=outcome.empty)
        garbage.after_step(p.steps_here)
        if outcome.blamed:
            self._note_non_finite(at)
        return self._pauses(multipliers, metrics)

    def _note_non_finite(self, at: int) -> None:
        """Find the layer once where a streak begins; fail the run when it lasts. Skipped updates leave the weights as they were,
        so the place found is where it began."""
        p = self.progress
        p.bad_streak += 1
        if p.bad_streak == 1:
            p.clock.stop()
            p.bad_since = p.step
            where, rank = first_text(diagnostics.locate_non_finite(self.session.stepper, self.session.batch(at)))
            p.bad_where = f"{where} (rank {rank})" if where else "no layer: it did not happen again when repeated"
        if p.bad_streak >= GIVE_UP_STEPS:
            raise TrainingFailed(
                f"loss or gradient not finite for {p.bad_streak} steps in a row, since step {p.bad_since}; it began in "
                f"{p.bad_where}. Lower the learning rates, or use compute_dtype float32 to see whether precision is the cause"
            )

    def _pauses(self, multipliers: Multipliers, metrics: dict[str, float]) -> bool:
        """Reports, evaluation and checkpoints that are due after this step. Returns whether to stop."""
        p, last = self.progress, self.progress.step == self.config.num_steps
        report = last or bool(metrics) or _due(p.step, max(1, self.runtime.log_every_steps))
        evaluate = _due(p.step, self.config.eval.every_steps) and not last
        core = _due(p.step, self.runtime.core_every_steps) and bool(self.runtime.core_bundle) and not last
        sample = _due(p.step, self.runtime.sample_every_steps) or (last and self.runtime.sample_every_steps > 0)
        save = self._save_due(report) and not last
        if not (report or evaluate or core or sample or save):
            return False
        info = p.step_info(multipliers.lr, metrics) if report else None
        p.clock.stop()
        p.note_diagnostics(metrics)
        if info is not None:
            self._explain_low_mfu(info)
            self.callbacks.call("on_step", info)
        self._evaluate_if(evaluate)
        if core:
            self._evaluate_core()
        if sample:
            self._sample()
        self._save_if(save)
        return not last and self._stop_agreed()

    def _explain_low_mfu(self, info: StepInfo) -> None:
        """Once a run: where MFU is low on a GPU, say what the likely cause is."""
        p, usual = self.progress, self.runtime.usual_mfu
        if self._explained or info.mfu is None or p.steps_here < SETTLED_STEPS or not is_low(info.mfu, usual):
            return
        self._explained = True
        cause = likely_cause(
            p.times.mean,
            p.times.compute_by_rank,
            micro_batch_tokens=self.session.stepper.micro_batch_rows * self.config.model.sequence_len,
            attention=self.session.model.choose_attention(self.session.device),
            windowed=min(self.config.model.windows) < self.config.model.sequence_len,
            mfu=info.mfu,
            usual_mfu=usual,
        )
        if self.ranks.is_main:
            _log.warning("MFU is %.0f%% of the device's peak%s: %s", 100 * info.mfu, _beside(usual), cause)

    def _save_due(self, at_report: bool) -> bool:
        step, every_seconds = self.progress.step, self.runtime.checkpoint_every_seconds
        due = _due(step, self.runtime.checkpoint_every_steps) or step in self.runtime.keep_steps
        if every_seconds > 0 and at_report and not due:  # clocks differ between ranks, so rank 0's decides
            due = broadcast(time.monotonic() - self._saved_at >= every_seconds)
        return due

    def _stop_agreed(self) -> bool:
        """Whether a callback of any rank asked to stop."""
        mine = self.callbacks.stop_reason
        if not all_max([float(mine is not None)])[0]:
            return False
        self.callbacks.stop_reason, _ = first_text(mine or "")
        return True

    def _evaluate_if(self, due: bool) -> None:
        if not due:
            return
        s = self.session
        val_bpb = evaluate_bpb(s.model, s.validation, s.token_bytes)
        if not math.isfinite(val_bpb):
            raise TrainingFailed(f"validation bpb is {val_bpb} at step {self.progress.step}: the weights are not finite any more")
        self.callbacks.call("on_eval", self.progress.point(val_bpb))

    def _evaluate_core(self) -> None:
        from nanochat_model.core import evaluate_core  # needs PyYAML; only runs that ask for CORE do

        result = evaluate_core(
            self.session.model, self.session.tokenizer(), self.runtime.core_bundle, max_per_task=self.runtime.core_max_per_task
        )
        self.progress.core = result.core if self.progress.step == self.config.num_steps else None
        self.callbacks.call("on_metrics", self.progress.step, result.as_metrics())

    def _sample(self) -> None:
        def on_one_rank() -> None:
            from nanochat_model.chat import sample_texts

            texts = sample_texts(self.session.model, self.session.tokenizer())
            self.callbacks.call("on_sample", self.progress.step, texts)

        on_main(on_one_rank)

    def _save_if(self, due: bool) -> None:
        if not due or self.runtime.keep_last <= 0:
            return
        step = self.progress.step
        optimizer_state = self.session.optimizer.consolidated_state(dst=0)  # every rank takes part
        on_main(lambda: self._write_checkpoint(optimizer_state))  # a full disk ends every rank, not one while the others wait
        self._saved_step, self._saved_at = step, time.monotonic()
        self.callbacks.call("on_checkpoint", step_dir(self.run_dir / CHECKPOINTS_DIR, step), step)

    def _write_checkpoint(self, optimizer_state: Any) -> None:
        p = self.progress
        state = CheckpointState(
            kind=self.kind,
            step=p.step,
            model=self.config.model,
            config=self.config,
            run_id=run_id(self.config),
            parents=self.parents,
            rng=capture_rng(),
            curve=tuple(p.curve),
            seconds=p.clock.seconds,
            loop=p.as_loop_state() | self.session.stepper.loss_scale.as_dict(),
            extra=self.extra,
        )
        copy_tokenizer(self.session.tokenizer_dir, self.run_dir)
        save_checkpoint(
            self.run_dir / CHECKPOINTS_DIR,
            state,
            self.session.model.state_dict(),
            optimizer_state,
            keep_last=self.runtime.keep_last,
            keep_steps=self.runtime.keep_steps,
        )


def _beside(usual_mfu: float) -> str:
    return f" (recorded runs: {100 * usual_mfu:.0f}%)" if usual_mfu else ""


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
