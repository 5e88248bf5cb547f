"""What a server is made of, without a server: texts, requests, prompts, the worker, the card, options."""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path

import pytest
import torch
from served import slowed, wait_until, write_checkpoint
from tiny_run import RUNTIME, tiny_config, tiny_shards

from nanochat_model.batching import Batcher, Event, Request
from nanochat_model.checkpoint import load_model, resolve
from nanochat_model.conversations import render_conversation, render_prompt
from nanochat_model.errors import ConfigError
from nanochat_model.sft import SFTConfig, sft
from nanochat_model.train import pretrain
from nanoladder.serve.card import model_card
from nanoladder.serve.errors import ApiError
from nanoladder.serve.options import ListenOptions, ModelOptions
from nanoladder.serve.prompt import assistant_parts, fit_prompt
from nanoladder.serve.text import TextStream
from nanoladder.serve.wire import parse_chat_request
from nanoladder.serve.worker import QueueFull, Worker, WorkerStopped

torch.set_num_threads(1)
TOKENIZER = tiny_shards().tokenizer
SOON = 240.0  # seconds in which a slow machine has long done it


# ---- text ----


@pytest.mark.parametrize("stops", [(), ("ab",), ("END", "E!"), ("é", "xyx"), ("aab",)])
def test_streamed_text_is_the_whole_text_up_to_the_first_stop(stops: tuple[str, ...]) -> None:
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choices("abxyE!ND é\n", k=rng.randint(0, 30)))
        stream = TextStream(TOKENIZER, stops)
        pieces = []
        for token in TOKENIZER.encode(text):
            pieces.append(stream.push(token))
            if stream.stopped:
                break
        pieces.append(stream.finish())
        cuts = [i for s in stops if (i := text.find(s)) >= 0]
        assert stream.stopped == bool(cuts)
        # Tokens end where they end: of two stops the one that is complete first counts, as a reader of the stream would see it.
        assert "".join(pieces) in {text[:i] for i in cuts} if cuts else "".join(pieces) == text


def test_what_may_become_a_stop_is_held_back_and_given_when_it_does_not() -> None:
    stream = TextStream(TOKENIZER, ("stop!",))
    shown = [stream.push(t) for t in TOKENIZER.encode("we sto")]
    assert "".join(shown) == "we "
    assert "".join(stream.push(t) for t in TOKENIZER.encode("re")) == "store"


def test_characters_come_whole() -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(t) for t in TOKENIZER.encode("é€😀")]
    assert len(pieces) > 3 and [p for p in pieces if p] == ["é", "€", "😀"]
    stream.push(TOKENIZER.encode("é")[0])
    assert stream.finish() == "\ufffd"


# ---- requests ----

GOOD = {"messages": [{"role": "user", "content": "hi"}]}


def test_what_clients_send_is_understood() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        "model": "m",
        "messages": [{"role": "developer", "content": "sys"}, {"role": "user", "content": parts}],
        "n": 1,
        "user": "x",
    }
    request = parse_chat_request(
        json.dumps({**body, "stop": "END", "tools": [], "max_tokens": 3, "max_completion_tokens": 5}).encode()
    )
    assert request.plain_messages() == [{"role": "system", "content": "sys"}, {"role": "user", "content": "ab"}]
    assert request.stops == ("END",) and request.reply_tokens == 5


@pytest.mark.parametrize(
    "change, param, message",
    [
        ({"n": 2}, "n", "n is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": float("nan")}, "top_p", "finite number"),  # which Python's JSON reads and writes
        ({"top_k": 1.5}, "top_k", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"seed": "x"}, "seed", "valid integer"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 texts"),
        ({"stop": ""}, "stop", "up to 4 texts"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "valid string"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(change: dict, param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(json.dumps({**GOOD, **change}).encode())
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body)
    assert caught.value.code == "invalid_json"


# ---- prompts ----


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": f"abc {i}"} for i in range(count)]


def test_a_prompt_that_fits_is_whole() -> None:
    prompt = fit_prompt(turns(3), TOKENIZER, 200, truncate=False)
    assert prompt.ids == render_prompt(turns(3), TOKENIZER) and prompt.room == 200 - len(prompt.ids) and prompt.dropped == 0


def test_a_full_context_is_an_error_or_loses_its_oldest_exchanges() -> None:
    messages = [{"role": "system", "content": "be kind"}, *turns(21)]
    with pytest.raises(ApiError) as caught:
        fit_prompt(messages, TOKENIZER, 100, truncate=False)
    assert caught.value.code == "context_length_exceeded"
    prompt = fit_prompt(messages, TOKENIZER, 100, truncate=True)
    assert prompt.dropped > 0 and prompt.dropped % 2 == 0 and prompt.room >= 25
    assert prompt.ids == render_prompt([messages[0], *messages[1 + prompt.dropped :]], TOKENIZER)
    more = fit_prompt([messages[0], *messages[prompt.dropped - 1 :]], TOKENIZER, 100, truncate=True)
    assert more.dropped == 2, "no more is dropped than must be"


def test_a_long_history_is_cut_in_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def render(messages: list[dict], tokenizer: object) -> list[int]:
        tries.append(len(messages))
        return [0] * (8 * len(messages))

    monkeypatch.setattr("nanoladder.serve.prompt.render_prompt", render)
    prompt = fit_prompt(turns(1601), TOKENIZER, 2000, truncate=True)
    assert prompt.dropped == 1360 and len(tries) < 15  # 8 · 241 tokens, and 64 for the reply: one exchange more does not fit


def test_a_question_that_is_too_long_is_an_error_even_then() -> None:
    for text in ("xyz " * 100, "x" * 10_000_000):
        with pytest.raises(ApiError, match="shorten"):
            fit_prompt([{"role": "user", "content": text}], TOKENIZER, 100, truncate=True)
    long = [*turns(2), {"role": "user", "content": "q" * 88}]
    prompt = fit_prompt(long, TOKENIZER, 100, truncate=True)  # no room for the usual reply, but for a short one
    assert prompt.dropped == 2 and 0 < prompt.room < 25


def test_turns_must_take_turns() -> None:
    with pytest.raises(ApiError, match="take turns"):
        fit_prompt([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], TOKENIZER, 100, truncate=False)


def test_an_earlier_call_is_read_as_the_call_it_was() -> None:
    text = "so <|python_start|>2*3<|python_end|><|output_start|>6<|output_end|> and <|python_start|>1<|python_end|>"
    parts = assistant_parts(text)
    assert [p["type"] for p in parts] == ["text", "python", "python_output", "text", "python"]
    ids = render_conversation(
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}]}, TOKENIZER
    ).ids
    assert TOKENIZER.special_id("<|python_start|>") in ids and text in TOKENIZER.decode(ids)
    assert assistant_parts("plain") == "plain"


# ---- the worker ----


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve"))


class Sink:
    def __init__(self) -> None:
        self.items: list[Event | Exception] = []
        self.ended = threading.Event()

    def __call__(self, item: Event | Exception) -> None:
        self.items.append(item)
        if isinstance(item, Exception) or item.finish:
            self.ended.set()


def make_worker(run_dir: Path, **options) -> Worker:
    model = load_model(run_dir)
    return Worker(lambda: Batcher(model, max_rows=2), **{"max_queue": 1, **options}).start()


def test_the_worker_queues_refuses_cancels_and_ends(run_dir: Path) -> None:
    worker = make_worker(run_dir)
    sinks = [Sink() for _ in range(4)]
    with slowed(worker):
        tickets = [worker.submit(Request(prompt=[1], max_tokens=500), s) for s in sinks[:3]]
        with pytest.raises(QueueFull):
            worker.submit(Request(prompt=[1], max_tokens=1), sinks[3])
        tickets[0].cancel()
        assert sinks[0].ended.wait(SOON) and sinks[0].items[-1].finish == "cancelled"
        tickets[0].cancel()
        wait_until(lambda: worker.status()["waiting"] == 0 and worker.status()["running"] == 2)
        tickets[2].cancel()
        worker.submit(Request(prompt=[1], max_tokens=3), sinks[3])
        assert sinks[3].ended.wait(SOON) and sinks[3].items[-1].finish == "length" and len(sinks[3].items) == 3
        worker.stop()
    assert sinks[1].ended.is_set() and isinstance(sinks[1].items[-1], WorkerStopped)
    with pytest.raises(WorkerStopped):
        worker.submit(Request(prompt=[1], max_tokens=1), Sink())
    assert not worker.alive


def test_a_request_cancelled_at_once_leaves_no_trace(run_dir: Path) -> None:
    worker = make_worker(run_dir, max_queue=50)
    for _ in range(20):
        worker.submit(Request(prompt=[1], max_tokens=400), Sink()).cancel()
    sink = Sink()
    worker.submit(Request(prompt=[1], max_tokens=2), sink)
    assert sink.ended.wait(SOON)
    wait_until(lambda: worker.status()["running"] == 0 and worker.status()["waiting"] == 0)
    worker.stop()


def test_a_failed_step_is_told_and_survived(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(run_dir)
    made = itertools.count()

    def make() -> Batcher:
        batcher = Batcher(model, max_rows=2)
        if next(made) == 0:
            monkeypatch.setattr(batcher, "_decode", lambda: 1 / 0)
        return batcher

    worker = Worker(make, max_queue=4).start()
    first, second = Sink(), Sink()
    ticket = worker.submit(Request(prompt=[1], max_tokens=5), first)
    assert first.ended.wait(SOON) and isinstance(first.items[-1], ZeroDivisionError)
    running = worker.submit(Request(prompt=[1], max_tokens=5), second)
    ticket.cancel()  # its number is another's by now
    assert second.ended.wait(SOON) and second.items[-1].finish == "length" and running.batch_id == ticket.batch_id
    assert worker.status()["failures"] == 1 and worker.status()["waiting"] == 0
    worker.stop()


def test_a_worker_that_cannot_start_afresh_lets_nobody_wait(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(load_model(run_dir), max_rows=1)
    both_are_in = threading.Event()
    monkeypatch.setattr(batcher, "_decode", lambda: both_are_in.wait(SOON) and 1 / 0)
    batchers = iter([batcher])
    worker = Worker(lambda: next(batchers), max_queue=4).start()
    sinks = [Sink(), Sink()]
    for sink in sinks:
        worker.submit(Request(prompt=[1], max_tokens=5), sink)
    both_are_in.set()
    assert all(sink.ended.wait(SOON) for sink in sinks)
    wait_until(lambda: not worker.alive)
    with pytest.raises(WorkerStopped):
        worker.submit(Request(prompt=[1], max_tokens=5), Sink())


# ---- the card ----


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A storage root with a pretrained run, its prediction, and a fine-tuning of it; the two run folders."""
    root = tmp_path_factory.mktemp("root")
    base, tuned = root / "runs" / "base", root / "sft" / "tuned"
    record = pretrain(tiny_config(num_steps=4, eval__every_steps=2), RUNTIME, run_dir=base)
    facts = {"run_id": record.run_id, "N": 1, "D": 1, "C": 1.0, "predicted": 5.0, "low": 0.1, "high": 9.0, "surface": None}
    facts |= {"predicted_at": "2026-11-21", "uses": [], "reasons": ["one"], "verdict": "warn", "laws_hash": "h"}
    (root / "prediction.json").write_text(json.dumps(facts))
    chats = root / "chats.jsonl"
    lines = [json.dumps([{"role": "user", "content": f"ab {i}"}, {"role": "assistant", "content": "cd"}]) for i in range(20)]
    chats.write_text("\n".join(lines))
    sft(SFTConfig(num_steps=2), RUNTIME, base_checkpoint=str(base), conversations=str(chats), run_dir=tuned)
    return base, tuned


@pytest.mark.parametrize("kind", ["base", "sft"])
def test_the_card_tells_prediction_and_result(workspace: tuple[Path, Path], kind: str) -> None:
    card = model_card(resolve(workspace[kind == "sft"]), name="mine" if kind == "base" else "")
    assert card["kind"] == kind and card["id"] == ("mine" if kind == "base" else "tuned")
    assert len(card["curve"]) == 2 and card["curve"][-1]["val_bpb"] == card["pretraining"]["val_bpb"]
    assert card["prediction"]["measured"] == card["pretraining"]["val_bpb"] and card["prediction"]["inside"] is True
    assert card["params"]["total"] == sum(p.numel() for p in load_model(workspace[0]).parameters())
    assert (card["sft"] is not None) == (kind == "sft")
    json.dumps(card, allow_nan=False)


def test_a_prediction_of_another_run_is_not_shown(workspace: tuple[Path, Path], tmp_path: Path) -> None:
    card = model_card(resolve(write_checkpoint(tmp_path / "runs" / "x")))
    assert card["prediction"] is None and card["pretraining"] is None and card["curve"] == []


# ---- options ----


def test_other_machines_are_let_in_only_when_told() -> None:
    with pytest.raises(ConfigError, match="--allow-remote"):
        ListenOptions(host="0.0.0.0")
    assert ListenOptions(host="0.0.0.0", allow_remote=True).hosts == ()
    assert "localhost" in ListenOptions(allowed_hosts=("chat.example",)).hosts
    assert "hush" not in repr(ListenOptions(api_key="hush"))
    assert "chat.example" in ListenOptions(allowed_hosts=("chat.example",)).hosts
    with pytest.raises(ConfigError, match="port 70000"):
        ListenOptions(port=70000)
    with pytest.raises(ConfigError, match="dtype 'int4'"):
        ModelOptions(checkpoint="x", dtype="int4")
    with pytest.raises(ConfigError, match="max_queue -1"):
        ModelOptions(checkpoint="x", max_queue=-1)
