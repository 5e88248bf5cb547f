"""What should worry whoever pays for a run: loss spikes, non-finite values, stalled ranks, drops of speed, restarts.

`Watch` decides, from the run's events and a clock, and needs nothing else; each trouble is told once, and again only after it
was over. `Webhook` sends what it is given; whatever its receiver does, the run goes on.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal
from urllib.parse import urlsplit

from nanochat_model.errors import ConfigError

Kind = Literal["loss_spike", "non_finite", "stalled", "slow", "restarted", "failed"]
WINDOW = 20  # reports that say what is usual
SETTLED = 5  # reports before anything is called unusual
WEBHOOK_TRIES = 3
WEBHOOK_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One trouble."""

    kind: Kind
    step: int
    text: str

    @property
    def line(self) -> str:
        return f"{self.kind.replace('_', ' ')} at step {self.step}: {self.text}"


def read_alerts(path: Path) -> list[Alert]:
    """Alerts of earlier starts of a run; none where there is no file."""
    return [Alert(**a) for a in json.loads(path.read_text(encoding="utf8"))] if path.exists() else []


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What counts as trouble. The loss's own scatter is measured by its median absolute deviation."""

    spike_nats: float = 0.3  # over the median of the last reports, at least
    spike_deviations: float = 8.0
    slow_share: float = 0.7  # of the usual tokens/s
    slow_reports: int = 3  # in a row
    stall_seconds: float = 120.0  # without a report, at least
    stall_factor: float = 10.0  # times the usual time between reports
    pause_seconds: float = 1800.0  # an evaluation or checkpoint may take that long
    silent_seconds: float = 30.0  # without a heartbeat: the rank's process is stopped or gone


@dataclass(kw_only=True)
class Watch:
    """Sees every event of one run, and is asked now and then whether time itself is trouble (`tick`)."""

    limits: Limits = field(default_factory=Limits)
    clock: Callable[[], float] = time.monotonic
    pauses_after: Callable[[int], bool] = lambda step: False  # whether an evaluation or a checkpoint follows this step
    step: int = 0
    beats: dict[int, tuple[float, str]] = field(default_factory=dict)  # rank -> (when, host and pid)
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _rates: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _gaps: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _seen_at: float | None = None
    _slow: int = 0
    _skipped: int = 0
    _open: set[str] = field(default_factory=set)  # troubles that were told and are not over
    _started: bool = False

    def see(self, event: dict[str, Any]) -> list[Alert]:
        kind, now = event["event"], self.clock()
        if kind == "beat":
            self.beats[event["rank"]] = (now, f"{event['host']} pid {event['pid']}")
            return []
        found: list[Alert] = []
        if kind == "start":
            found += self._restart(event["step"])
        elif kind == "step":
            if self._seen_at is not None and not self.pauses_after(self.step):
                self._gaps.append(now - self._seen_at)
            self.step = event["step"]
            found += self._values(event) + self._speed(event)
        self._seen_at = now
        self._open.discard("stalled")
        return found

    def tick(self) -> list[Alert]:
        """Alerts that come from silence."""
        if self._seen_at is None or not self._started:
            return []
        now = self.clock()
        usual = median(self._gaps) if self._gaps else 0.0
        limit = max(self.limits.stall_seconds, self.limits.stall_factor * usual)
        if self.pauses_after(self.step):
            limit = max(limit, self.limits.pause_seconds)
        quiet = now - self._seen_at
        silent = [f"rank {r} ({where})" for r, (at, where) in sorted(self.beats.items()) if now - at > self.limits.silent_seconds]
        if quiet <= limit and not (silent and quiet > self.limits.silent_seconds):
            return []
        ranks = f"silent: {', '.join(silent)}" if silent else f"all {len(self.beats)} ranks are alive and wait inside a step"
        return self._tell("stalled", f"no step for {quiet:.0f} s; {ranks}")

    def _restart(self, step: int) -> list[Alert]:
        again, self._started = self._started, True
        self.beats.clear()
        self._rates.clear()
        self._gaps.clear()
        self._slow = 0
        lost = self.step - step
        self.step = step
        return [Alert(kind="restarted", step=step, text=f"workers were replaced; {lost} steps are done again")] if again else []

    def _values(self, event: dict[str, Any]) -> list[Alert]:
        loss, skipped = event["train_loss"], event.get("skipped_steps", 0)
        found: list[Alert] = []
        if not math.isfinite(loss) or skipped > self._skipped:
            found = self._tell("non_finite", f"a loss or gradient was not finite; {skipped} updates were skipped so far")
        else:
            self._open.discard("non_finite")
        self._skipped = max(self._skipped, skipped)
        if not math.isfinite(loss):
            return found
        if len(self._losses) >= SETTLED:
            usual = median(self._losses)
            scatter = 1.4826 * median(abs(x - usual) for x in self._losses)
            if loss > usual + max(self.limits.spike_nats, self.limits.spike_deviations * scatter):
                found += self._tell("loss_spike", f"loss {loss:.3f}, {loss - usual:.3f} above the usual {usual:.3f}")
                return found  # a spike must not become the usual
            self._open.discard("loss_spike")
        self._losses.append(loss)
        return found

    def _speed(self, event: dict[str, Any]) -> list[Alert]:
        rate = event["tokens_per_second"]
        if not rate:
            return []
        if len(self._rates) >= SETTLED and rate < self.limits.slow_share * median(self._rates):
            self._slow += 1
            if self._slow >= self.limits.slow_reports:
                usual = median(self._rates)
                return self._tell("slow", f"{rate:,.0f} tokens/s, {rate / usual:.0%} of the usual {usual:,.0f}")
            return []
        self._slow = 0
        self._open.discard("slow")
        self._rates.append(rate)
        return []

    def _tell(self, kind: Kind, text: str) -> list[Alert]:
        if kind in self._open:
            return []
        self._open.add(kind)
        return [Alert(kind=kind, step=self.step, text=text)]


class Webhook:
    """Posts alerts as JSON, from a thread: {"run_id", "name", "kind", "step", "text"}. Chat services show `text`."""

    def __init__(self, url: str, facts: dict[str, Any], warn: Callable[[str], None]) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ConfigError(f"webhook {url!r} is no http address; for example https://hooks.example.org/T0/B0")
        self._url, self._facts, self._warn = url, facts, warn
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(1000)
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def send(self, alert: Alert) -> None:
        """Returns at once."""
        text = f"{self._facts.get('name', 'run')} {self._facts.get('run_id', '')}: {alert.line}"
        try:
            self._queue.put_nowait({**self._facts, **asdict(alert), "text": text})
        except queue.Full:
            self._complain("too many alerts wait")

    def close(self, seconds: float = 15.0) -> None:
        """Wait for what is on its way, but not longer."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            for attempt in range(WEBHOOK_TRIES):
                reason = self._post(item)
                if not reason:
                    break
                if attempt < WEBHOOK_TRIES - 1:
                    time.sleep(0.5 * 2**attempt)
            else:
                self._complain(reason)

    def _post(self, item: dict[str, Any]) -> str:
        """Why it did not get through; "" if it did."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, data=json.dumps(item).encode(), headers=headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=WEBHOOK_TIMEOUT_SECONDS):
                return ""
        except (urllib.error.URLError, OSError, ValueError) as e:
            return str(e)

    def _complain(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"webhook {urlsplit(self._url).netloc} does not take alerts ({reason}); the run goes on without it")
