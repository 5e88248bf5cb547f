"""Alerts: each trouble is told once, quiet runs tell nothing, and a webhook that is dead stops nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from webhook_receiver import WebhookReceiver

from nanochat_model.errors import ConfigError
from nanoladder.alerts import Alert, Limits, Watch, Webhook


@dataclass
class Run:
    """Events of a made-up run with a clock of its own: a report of 10 steps each second."""

    watch: Watch = field(default_factory=Watch)
    now: float = 0.0
    step: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.watch.clock = lambda: self.now
        self.watch.see({"event": "start", "step": 0})

    def report(self, loss: float | None = None, rate: float = 1000.0, skipped: int = 0, seconds: float = 1.0) -> list[Alert]:
        self.now += seconds
        self.step += 10
        usual = 3 + 3 / (1 + self.step / 100) + self.rng.gauss(0, 0.03)
        event = {"event": "step", "step": self.step, "train_loss": usual if loss is None else loss, "tokens_per_second": rate}
        return self.watch.see({**event, "skipped_steps": skipped})

    def reports(self, count: int, **values: Any) -> list[Alert]:
        return [a for _ in range(count) for a in self.report(**values)]

    def beat(self, *ranks: int) -> None:
        for rank in ranks:
            self.watch.see({"event": "beat", "rank": rank, "host": f"node{rank}", "pid": 100 + rank, "step": self.step})


def kinds(alerts: list[Alert]) -> list[str]:
    return [a.kind for a in alerts]


def test_a_quiet_run_tells_nothing() -> None:
    run = Run()
    found = []
    for i in range(500):
        found += run.report(rate=1000 * run.rng.uniform(0.85, 1.15))
        run.beat(0, 1)
        found += run.watch.tick()
        if i % 50 == 0:
            run.watch.see({"event": "eval", "step": run.step, "val_bpb": 1.0})
    assert not found


def test_a_loss_spike_is_told_once_until_it_is_over() -> None:
    run = Run()
    run.reports(40)
    assert kinds(run.reports(5, loss=7.5)) == ["loss_spike"]
    assert not run.reports(20)
    again = run.report(loss=7.5)
    assert kinds(again) == ["loss_spike"] and "above the usual" in again[0].text and again[0].step == run.step
    noisy = Run()
    for _ in range(60):  # a loss that scatters by half a nat has no spike at one nat
        noisy.report(loss=4 + noisy.rng.uniform(-0.5, 0.5))
    assert not noisy.report(loss=5.0)
    steady = Run()
    steady.reports(10, loss=4.0)
    assert not steady.report(loss=4.29) and kinds(steady.report(loss=4.31)) == ["loss_spike"]


def test_non_finite_values_are_told_also_where_only_a_skipped_step_shows_them() -> None:
    run = Run()
    run.reports(10)
    assert kinds(run.report(loss=math.nan, skipped=1)) == ["non_finite"]
    assert not run.report(loss=math.nan, skipped=2)
    assert not run.reports(5, skipped=2)
    found = run.report(skipped=4)  # the reported step was fine, steps between were not
    assert kinds(found) == ["non_finite"] and "4 updates were skipped" in found[0].text


def test_a_drop_of_speed_must_last_before_it_is_told() -> None:
    run = Run()
    run.reports(20)
    assert not run.reports(2, rate=500) and not run.reports(5)
    found = run.reports(10, rate=500)
    assert kinds(found) == ["slow"] and "500 tokens/s, 50% of the usual 1,000" in found[0].text
    assert not run.reports(5) and kinds(run.reports(5, rate=100)) == ["slow"]


def test_a_stalled_run_names_the_silent_rank() -> None:
    run = Run(Watch(limits=Limits(stall_seconds=100)))
    run.reports(10)
    for _ in range(6):
        run.now += 10
        run.beat(0, 1, 3)
        if run.now < 20:
            run.beat(2)
    run.beat(2)
    for _ in range(5):
        run.now += 10
        run.beat(0, 1, 3)
    found = run.watch.tick()
    assert kinds(found) == ["stalled"] and "silent: rank 2 (node2 pid 102)" in found[0].text
    assert not run.watch.tick(), "told once"
    run.report()
    run.now += 101
    run.beat(0, 1, 2, 3)
    found = run.watch.tick()
    assert kinds(found) == ["stalled"] and "all 4 ranks are alive and wait inside a step" in found[0].text


def test_evaluations_may_take_long_and_steps_may_be_slow() -> None:
    run = Run(Watch(limits=Limits(stall_seconds=100, pause_seconds=1000), pauses_after=lambda step: step == 100))
    run.reports(10)
    run.now += 900
    run.beat(0)
    assert not run.watch.tick()
    run.now += 101
    run.beat(0)
    assert kinds(run.watch.tick()) == ["stalled"]
    slow = Run(Watch(limits=Limits(stall_seconds=100)))
    slow.reports(10, seconds=60)
    slow.now += 500
    slow.beat(0)
    assert not slow.watch.tick(), "reports come once a minute here"
    slow.now += 101
    slow.beat(0)
    assert kinds(slow.watch.tick()) == ["stalled"], "ten times the usual"


def test_replaced_workers_are_told_with_what_was_lost() -> None:
    run = Run()
    run.reports(10)
    found = run.watch.see({"event": "start", "step": 70})
    assert kinds(found) == ["restarted"] and "30 steps are done again" in found[0].text
    assert not run.reports(3, rate=10), "after a restart nothing is usual yet"


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as server:
        yield server


ALERT = Alert(kind="loss_spike", step=120, text="loss 7.5")


def test_a_webhook_gets_json_even_if_it_refuses_first(receiver: WebhookReceiver) -> None:
    receiver.refuse = 1
    warnings: list[str] = []
    hook = Webhook(receiver.url, {"run_id": "abc", "name": "production"}, warnings.append)
    hook.send(ALERT)
    hook.close()
    text = "production abc: loss spike at step 120: loss 7.5"
    assert receiver.got == [{"run_id": "abc", "name": "production", "kind": "loss_spike", "step": 120, "text": text}]
    assert not warnings


def test_a_dead_webhook_is_named_once_and_waited_for_no_longer() -> None:
    warnings: list[str] = []
    hook = Webhook("http://127.0.0.1:9/hook", {}, warnings.append)  # the discard port: nobody listens
    for _ in range(2):
        hook.send(ALERT)
    hook.close()
    assert len(warnings) == 1 and "does not take alerts" in warnings[0] and "the run goes on" in warnings[0]
    with pytest.raises(ConfigError, match="is no http address"):
        Webhook("file:///etc/passwd", {}, warnings.append)
