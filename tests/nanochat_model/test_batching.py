"""Continuous batching against the engine with one prompt at a time: the same tokens, whoever shares the batch and when."""

from __future__ import annotations

import random

import pytest
import reference_model as ref
import torch

from nanochat_model.batching import Batcher, Request, run_requests
from nanochat_model.engine import generate
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.interop import config_from_nanochat
from nanochat_model.sampling import Sampling

torch.set_num_threads(1)
VOCAB = 90


@pytest.fixture(scope="module")
def model() -> GPT:
    """Smear, windows, grouped keys, value embeddings and backout all at work."""
    config = ref.model_config(depth=3, dim=48, heads=4, kv_heads=2, T=160, vocab=VOCAB, pattern="SSL")
    model = GPT(config_from_nanochat(config))
    model.load_state_dict(ref.random_weights(config))
    return model.eval()


def alone(model: GPT, request: Request) -> list[int]:
    """The slow, obvious way: the engine, with this prompt only."""
    s = request.sampling
    settings = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "seed": s.seed}
    steps = generate(model, [request.prompt], max_tokens=request.max_tokens, stop_ids=sorted(request.stop_ids), **settings)
    return [ids[0] for ids in steps]


def some_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 150 tokens (the short window is 128), greedy and sampled, with and without stops."""
    rng = random.Random(seed)
    settings = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 10}, {"temperature": 1.2, "top_p": 0.9}]
    return [
        Request(
            prompt=[rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 30, 129, 150]))],
            max_tokens=rng.choice([1, 2, 9, 25]),
            sampling=Sampling(**settings[i % 4], seed=rng.randrange(100)),
            stop_ids=frozenset(rng.sample(range(VOCAB), 2)) if i % 3 == 0 else frozenset(),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("max_rows, prefill_tokens", [(1, 256), (3, 7), (6, 64)])
def test_each_request_says_what_it_says_alone_whenever_it_joins(model: GPT, max_rows: int, prefill_tokens: int) -> None:
    requests, rng = some_requests(16), random.Random(max_rows)
    batcher = Batcher(model, max_rows=max_rows, max_tokens=200, prefill_tokens=prefill_tokens)
    made: dict[int, list[int]] = {}
    finish: dict[int, str] = {}
    todo = list(requests)
    ids: list[int] = []
    most = 0
    while todo or batcher.busy:
        while todo and rng.random() < 0.6:  # they come at odd times
            ids.append(batcher.submit(todo.pop(0)))
        most = max(most, batcher.num_running)
        events = batcher.step()
        assert len({e.request_id for e in events}) == len(events), "a request has at most one token a step"
        for event in events:
            assert event.request_id not in finish and event.token is not None
            made.setdefault(event.request_id, []).append(event.token)
            if event.finish:
                finish[event.request_id] = event.finish
    assert most == max_rows
    for number, request in zip(ids, requests, strict=True):
        assert made[number] == alone(model, request)
        assert finish[number] == ("stop" if made[number][-1] in request.stop_ids else "length")


def test_seeds_differ_and_repeat(model: GPT) -> None:
    def said(seed: int) -> list[int]:
        return run_requests(model, [Request(prompt=[1, 2], max_tokens=12, sampling=Sampling(seed=seed))])[0]

    assert said(1) == said(1) != said(2)


def test_cancelled_requests_leave_and_the_others_do_not_notice(model: GPT) -> None:
    """One running, one whose prompt is half read, one waiting."""
    batcher = Batcher(model, max_rows=3, max_tokens=200, prefill_tokens=40)
    stays = Request(prompt=[3, 4, 5], max_tokens=40, sampling=Sampling(seed=5))
    other = Request(prompt=[9], max_tokens=60, sampling=Sampling(temperature=0.0))
    long = Request(prompt=[7] * 150, max_tokens=5)
    a, b, c, d = (batcher.submit(r) for r in (other, stays, long, long))
    events = [e for _ in range(3) for e in batcher.step()]
    assert batcher.num_running == 3 and batcher.num_waiting == 1
    for number in (a, c, d):
        batcher.cancel(number)
    batcher.cancel(12345)
    left = batcher.step()
    assert [(e.request_id, e.token, e.finish) for e in left[:3]] == [(i, None, "cancelled") for i in sorted((a, c, d))]
    events += left[3:]
    while batcher.busy:
        events += batcher.step()
    assert [e.token for e in events if e.request_id == b] == alone(model, stays)
    assert {e.request_id for e in events} <= {a, b}


def test_a_long_prompt_holds_nobody_up_for_longer_than_a_piece(model: GPT) -> None:
    batcher = Batcher(model, max_rows=2, max_tokens=200, prefill_tokens=10)
    first = batcher.submit(Request(prompt=[1], max_tokens=30))
    batcher.step()
    second = batcher.submit(Request(prompt=[2] * 100, max_tokens=3))
    steps = 0
    while True:
        events = batcher.step()
        steps += 1
        assert events[0].request_id == first
        if any(e.request_id == second for e in events):
            break
    assert steps == 10


def test_waiting_requests_are_served_in_order(model: GPT) -> None:
    batcher = Batcher(model, max_rows=2)
    ids = [batcher.submit(Request(prompt=[i + 1] * 5, max_tokens=4)) for i in range(7)]
    first_seen: list[int] = []
    while batcher.busy:
        first_seen += [e.request_id for e in batcher.step() if e.request_id not in first_seen]
    assert first_seen == ids


def test_a_tool_speaks_in_between_and_sampling_goes_on_from_it(model: GPT) -> None:
    """After its third token the tool says 7 8 9; then the model continues the whole."""
    sampling = Sampling(temperature=0.0)

    def tool(made: list[int]) -> list[int]:
        return [7, 8, 9] if len(made) == 3 else []

    request = Request(prompt=[5, 6], max_tokens=10, sampling=sampling, tool=tool)
    neighbour = Request(prompt=[1], max_tokens=20, sampling=Sampling(seed=3))
    said, beside = run_requests(model, [request, neighbour], max_rows=2)
    before = alone(model, Request(prompt=[5, 6], max_tokens=3, sampling=sampling))
    after = alone(model, Request(prompt=[5, 6, *before, 7, 8, 9], max_tokens=4, sampling=sampling))
    assert said == [*before, 7, 8, 9, *after]
    assert beside == alone(model, neighbour)


def test_bf16_runs_together(model: GPT) -> None:
    half = GPT(model.config, compute_dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    requests = some_requests(6)
    said = run_requests(half.eval(), requests, max_rows=3, max_tokens=200)
    assert all(0 < len(s) <= r.max_tokens for s, r in zip(said, requests, strict=True))


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(prompt=[], max_tokens=1), "a prompt is empty"),
        (Request(prompt=[VOCAB], max_tokens=1), "leave the vocabulary"),
        (Request(prompt=[1], max_tokens=0), "max_tokens 0 must be at least 1"),
        (Request(prompt=[1] * 100, max_tokens=61), "prompt of 100 and max_tokens 61 exceed the row of 160"),
    ],
)
def test_bad_requests_are_named(model: GPT, request_: Request, message: str) -> None:
    batcher = Batcher(model)
    with pytest.raises(ConfigError, match=message):
        batcher.submit(request_)
    assert not batcher.busy


def test_bad_sizes_are_named(model: GPT) -> None:
    with pytest.raises(ConfigError, match=r"must lie in 2\.\.1600"):
        Batcher(model, max_tokens=1601)
    with pytest.raises(ConfigError, match="max_rows 0"):
        Batcher(model, max_rows=0)
