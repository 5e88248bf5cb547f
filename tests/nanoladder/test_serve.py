"""A real server through the openai client: the engine's own replies, many at once, errors, limits, and who may come."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served import CONTEXT, serving, slowed, wait_until, write_checkpoint
from starlette.testclient import TestClient

from nanochat_model.checkpoint import load_model, tokenizer_dir
from nanochat_model.conversations import render_prompt
from nanochat_model.engine import generate
from nanochat_model.tokenizer import Tokenizer
from nanoladder.serve.app import create_app
from nanoladder.serve.options import ListenOptions
from nanoladder.serve.service import Service

torch.set_num_threads(1)
HI = [{"role": "user", "content": "hello there"}]
ROWS, QUEUE = 4, 12


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[tuple[str, Service]]:
    with serving(run_dir, max_rows=ROWS, max_queue=QUEUE) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=300)


def engines_own(run_dir: Path, messages: list[dict[str, str]], **settings: Any) -> str:
    """The same by the one-at-a-time engine."""
    tokenizer = Tokenizer.load(tokenizer_dir(run_dir))
    prompt = render_prompt(messages, tokenizer)
    return tokenizer.decode([ids[0] for ids in generate(load_model(run_dir), [prompt], **settings)])


def status(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/healthz", timeout=300) as response:
        return json.load(response)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "nanoladder"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_reply_is_the_engines(client: openai.OpenAI, run_dir: Path) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=12)
    assert reply.choices[0].message.content == engines_own(run_dir, HI, temperature=0.0, max_tokens=12)
    assert reply.choices[0].finish_reason == "length" and reply.choices[0].message.role == "assistant"
    tokenizer = Tokenizer.load(tokenizer_dir(run_dir))
    assert reply.usage.prompt_tokens == len(render_prompt(HI, tokenizer)) and reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12


def test_streaming_says_the_same_and_counts(client: openai.OpenAI, run_dir: Path) -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 40}
    stream = client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 20}, **settings
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == engines_own(run_dir, HI, top_k=20, **settings)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 40 and len(chunks) > 10
    assert len({c.id for c in chunks}) == 1


def test_more_people_than_rows_get_each_their_own(client: openai.OpenAI, run_dir: Path) -> None:
    def ask(i: int) -> tuple[str, str]:
        messages = [{"role": "user", "content": f"number {i} " * (i % 5 + 1)}]
        settings: dict[str, Any] = {
            "temperature": [0.0, 0.8, 1.2][i % 3],
            "seed": i,
            "max_tokens": 5 + 3 * i,
            "top_p": [1, 0.8][i % 2],
        }
        reply = client.chat.completions.create(model="tiny", messages=messages, extra_body={"top_k": 0}, **settings)
        return reply.choices[0].message.content, engines_own(run_dir, messages, **settings)

    with ThreadPoolExecutor(12) as pool:
        for found, expected in pool.map(ask, range(12)):
            assert found == expected


def test_seeds_repeat_and_without_one_replies_differ(client: openai.OpenAI) -> None:
    def say(**more: Any) -> str:
        return (
            client.chat.completions.create(model="tiny", messages=HI, temperature=1.0, max_tokens=20, **more)
            .choices[0]
            .message.content
        )

    assert say(seed=1) == say(seed=1) != say(seed=2)
    assert say() != say()


def test_stop_texts_end_a_reply(client: openai.OpenAI, run_dir: Path, server: tuple[str, Service]) -> None:
    whole = engines_own(run_dir, HI, temperature=0.0, max_tokens=60)
    stop = whole[20:23]
    reply = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=60, stop=[stop, "never"])
    assert reply.choices[0].message.content == whole[: whole.index(stop)] and reply.choices[0].finish_reason == "stop"
    wait_until(lambda: status(server[0])["running"] == 0)


def test_the_models_own_end_is_a_stop_and_not_shown(run_dir: Path, tmp_path: Path) -> None:
    from nanochat_model.checkpoint import CheckpointState, save_checkpoint

    model, tokenizer = load_model(run_dir), Tokenizer.load(tokenizer_dir(run_dir))
    first = engines_own(run_dir, HI, temperature=0.0, max_tokens=3)
    with torch.no_grad():  # whatever follows three greedy tokens becomes the end
        prompt = render_prompt(HI, tokenizer)
        steps = generate(model, [prompt], max_tokens=3, temperature=0.0)
        features = model.features(torch.tensor([prompt + [s[0] for s in steps]]))[0, -1]
        model.lm_head.weight[tokenizer.special_id("<|assistant_end|>")] = features * 2 / features.square().sum().sqrt()
    state = CheckpointState(kind="sft", step=1, model=model.config)
    tokenizer.save(tmp_path / "tokenizer")
    save_checkpoint(tmp_path / "checkpoints", state, model.state_dict())
    with serving(tmp_path) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        reply = client.chat.completions.create(model="", messages=HI, temperature=0, max_tokens=50)
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens <= 3
    assert first.startswith(reply.choices[0].message.content)


@pytest.mark.parametrize(
    "change, kind, code",
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found"),
        ({"n": 2}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"beam": 3}}, openai.BadRequestError, "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": [*HI, *HI]}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * (1 << 20)}]}, openai.APIStatusError, "request_too_large"),
    ],
)
def test_errors_arrive_as_the_clients_own(client: openai.OpenAI, change: dict, kind: type, code: str) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HI, **change})
    assert caught.value.code == code and caught.value.body["message"]


def test_a_long_history_is_cut_when_asked(client: openai.OpenAI) -> None:
    talk = [{"role": "assistant" if i % 2 else "user", "content": "blah " * 12} for i in range(41)]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=talk, max_tokens=4)
    reply = client.chat.completions.create(model="tiny", messages=talk, max_tokens=4, extra_body={"truncate_history": True})
    assert reply.usage.prompt_tokens < CONTEXT and reply.to_dict()["dropped_messages"] > 0


def test_who_goes_away_frees_the_row(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    with slowed(server[1].worker):
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True, max_tokens=480)
        for _ in range(3):
            next(iter(stream))
        assert status(server[0])["running"] == 1
        stream.close()
        wait_until(lambda: status(server[0])["running"] == 0)
        address = ("127.0.0.1", int(server[0].rsplit(":", 1)[1]))
        body = json.dumps({"messages": HI, "max_tokens": 480}).encode()
        before, made = server[1].worker.num_requests, server[1].worker.num_tokens
        with socket.create_connection(address) as sock:  # not streaming: nothing is sent before the end
            head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
            sock.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            wait_until(lambda: server[1].worker.num_requests == before + 1)
        wait_until(lambda: status(server[0])["running"] == 0 and status(server[0])["waiting"] == 0)
        assert server[1].worker.num_tokens - made < 480


def test_a_full_queue_says_so(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    long: dict[str, Any] = {"model": "tiny", "messages": HI, "stream": True, "max_tokens": 480}
    with slowed(server[1].worker):
        streams = [client.chat.completions.create(**long) for _ in range(ROWS + QUEUE)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
        assert caught.value.code == "queue_full" and caught.value.response.headers["Retry-After"]
        for stream in streams:
            stream.close()
        wait_until(lambda: status(server[0])["running"] == 0 and status(server[0])["waiting"] == 0)
    assert client.chat.completions.create(model="tiny", messages=HI, max_tokens=1).usage.completion_tokens == 1


def test_no_reply_is_longer_than_the_server_allows(run_dir: Path) -> None:
    with serving(run_dir, max_reply_tokens=3) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        reply = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=50)
    assert reply.usage.completion_tokens == 3 and reply.choices[0].finish_reason == "length"


def test_a_key_is_asked_for_and_other_names_are_refused(server: tuple[str, Service]) -> None:
    """Around a service that runs already: no lifespan."""
    web = TestClient(create_app(server[1], api_key="secret", allowed_hosts=("localhost",)), base_url="http://localhost")
    assert web.get("/").status_code == 200 and web.get("/healthz").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        response = web.post("/v1/chat/completions", json={"messages": HI}, headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert web.get("/card.json", headers=headers).status_code == 401
    assert web.get("/v1/models", headers={"Authorization": "Bearer secret"}).json()["data"][0]["id"] == "tiny"
    assert web.get("/", headers={"Host": "evil.example"}).status_code == 400
    loopback = TestClient(create_app(server[1], allowed_hosts=ListenOptions(host="::1").hosts), base_url="http://[::1]:8000")
    assert loopback.get("/").status_code == 200
    assert "default-src 'none'" in web.get("/").headers["Content-Security-Policy"]


def test_other_sites_forms_and_wrong_addresses_get_json_errors(server: tuple[str, Service]) -> None:
    web = TestClient(create_app(server[1]))
    response = web.post("/v1/chat/completions", content=json.dumps({"messages": HI}), headers={"Content-Type": "text/plain"})
    assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    assert web.get("/v1/completions").json()["error"]["code"] == "not_found"
    assert web.get("/v1/chat/completions").status_code == 405


def test_the_command_serves_until_told_to_end(run_dir: Path, tmp_path: Path) -> None:
    main = [sys.executable, "-c", "from nanoladder.cli import main; main()", "serve", str(run_dir), "--json", "--num-threads", "1"]
    command = [*main, "--port", "0"]
    env = os.environ | {"NANOLADDER_NATIVE": "0"}  # a machine without a C compiler would be told so on stderr
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    try:
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        facts = json.loads("".join(lines))
        assert facts["model"] == "tiny" and status(facts["url"])["status"] == "ok"
        with urllib.request.urlopen(facts["url"], timeout=300) as page:
            assert b"<textarea" in page.read()
        taken = facts["url"].rsplit(":", 1)[1]
        again = subprocess.run([*main, "--port", taken], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
        assert again.returncode == 2 and again.stderr.count("\n") == 1 and "another --port" in again.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
