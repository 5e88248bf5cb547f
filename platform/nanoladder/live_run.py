"""A launched run in the terminal: one live line, and above it what happens: evaluations, CORE, samples, alerts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nanochat_model.step_shares import describe_startup, describe_times
from nanoladder.alerts import Alert
from nanoladder.plan import LaunchPlan

LOG_EVERY_SECONDS = 30.0  # between step lines where there is no terminal
SAMPLE_CHARACTERS = 200


class LiveRun:
    """Context manager. `event` takes the run's events, `alert` its alerts, `say` any other line."""

    def __init__(self, plan: LaunchPlan, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan = plan
        self.console = console or Console(highlight=False)
        self._clock = clock
        self._live: Live | None = None
        self._logged_at: float | None = None
        self._untold = {"startup", "times"}
        self.val_bpb: float | None = None
        self.alerts = 0

    def __enter__(self) -> LiveRun:
        if self.console.is_terminal:
            self._live = Live(Text("starting the workers ..."), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def alert(self, alert: Alert) -> None:
        self.alerts += 1
        self.say(f"ALERT {alert.line}", "bold red")

    def event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "step":
            self._step(event)
        elif kind == "start" and event["step"]:
            self.say(f"goes on from step {event['step']}")
        elif kind == "eval":
            self.val_bpb = event["val_bpb"]
            self.say(f"step {event['step']}: validation {event['val_bpb']:.4f} bpb")
        elif kind == "metrics":
            core = event["metrics"].get("core")
            self.say(f"step {event['step']}: " + (f"CORE {core:.4f}" if core is not None else str(event["metrics"])))
        elif kind == "sample":
            for text in event["texts"]:
                self.say(f"step {event['step']}: {text[:SAMPLE_CHARACTERS]!r}", "dim")

    def _step(self, event: dict[str, Any]) -> None:
        self._tell_times(event)
        line = step_line(event, self.plan, self.val_bpb)
        if self._live is not None:
            alerts = f"  {self.alerts} alert(s)" if self.alerts else ""
            self._live.update(Text(line + alerts))
            return
        now, last = self._clock(), event["step"] == self.plan.config.num_steps
        if last or self._logged_at is None or now - self._logged_at >= LOG_EVERY_SECONDS:
            self._logged_at = now
            self.say(line)

    def _tell_times(self, event: dict[str, Any]) -> None:
        """Once each: how long the first step took, and where a step's time goes."""
        startup, times = event.get("startup_seconds"), event.get("step_seconds")
        if startup and "startup" in self._untold:
            self._untold.remove("startup")
            self.say(describe_startup(startup))
        if times and "times" in self._untold:
            self._untold.remove("times")
            self.say(f"a step: {describe_times(times, event.get('rank_compute_seconds', ()))}")


def step_line(event: dict[str, Any], plan: LaunchPlan, val_bpb: float | None = None) -> str:
    """Step, loss, bpb, speed, MFU, time left, money spent, in one line."""
    num_steps, speed = plan.config.num_steps, event["tokens_per_second"] or 0.0
    parts = [f"step {event['step']:,}/{num_steps:,}", f"loss {event['train_loss']:.4f}"]
    parts.append(f"bpb {val_bpb:.4f}" if val_bpb is not None else "bpb –")
    parts += [f"{speed:,.0f} tok/s", f"MFU {event['mfu']:.1%}" if event["mfu"] else "MFU unknown"]
    if speed:
        parts.append(f"{span((num_steps - event['step']) * plan.config.batch_tokens / speed)} left")
    price = plan.target.price_per_device_hour
    if price:
        spent = event["seconds"] / 3600 * price * plan.target.num_devices
        parts.append(f"${spent:,.2f}" + (f" of ${plan.dollars:,.2f}" if plan.dollars else ""))
    return "  ".join(parts)


def span(seconds: float) -> str:
    """45 s, 12 min, 3 h 07 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
