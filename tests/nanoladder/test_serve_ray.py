"""The server as replicas on Ray Serve, through the command: answers, shares the work, ends with the command."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import wait_until, write_checkpoint

pytest.importorskip("watchfiles", reason="Ray Serve is not installed (pip install 'ray[serve]')")
pytestmark = [pytest.mark.slow, pytest.mark.seconds(30)]
LONG = 30_000  # tokens: many seconds
BODY = {"messages": [{"role": "user", "content": "hello there"}], "temperature": 0, "max_tokens": 12}


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        text = response.read().decode()
    return json.loads(text) if text.startswith("{") else text


def leave_a_stream(url: str, max_tokens: int) -> None:
    """Ask for a long reply, read its beginning, go away."""
    body = {**BODY, "stream": True, "max_tokens": max_tokens}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        for _ in range(4):
            assert response.readline()


def test_replicas_answer_alike_and_go_with_the_command(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", context=LONG + 100)
    main = [sys.executable, "-c", "from nanoladder.cli import main; main()", "serve", str(checkpoint), "--json", "--port", "0"]
    command = [*main, "--ray", "--replicas", "2", "--num-threads", "1", "--max-rows", "2", "--max-reply-tokens", str(LONG)]
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as ray_dir:
        env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"NANOLADDER_RAY_DIR": ray_dir}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
        try:
            assert process.stdout is not None and process.stderr is not None
            lines: list[str] = []
            while not lines or lines[-1] != "}\n":
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            url = json.loads("".join(lines))["url"]
            with ThreadPoolExecutor(8) as pool:
                replies = list(pool.map(lambda _: ask(f"{url}/v1/chat/completions", BODY), range(16)))
            assert len({r["choices"][0]["message"]["content"] for r in replies}) == 1
            assert sum(r["usage"]["completion_tokens"] for r in replies) == 16 * 12
            asked = itertools.count(17)

            def both_have_answered() -> bool:
                ask(f"{url}/v1/chat/completions", BODY)
                return max(ask(f"{url}/healthz")["requests"] for _ in range(20)) < next(asked)

            wait_until(both_have_answered)  # the proxy hears of one replica before it hears of the other
            stream = ask(f"{url}/v1/chat/completions", {**BODY, "stream": True})
            assert stream.count("data: ") > 3 and stream.endswith("data: [DONE]\n\n")
            assert "<textarea" in ask(url)
            leave_a_stream(url, LONG)
            wait_until(lambda: all(ask(f"{url}/healthz")["running"] == 0 for _ in range(10)))
            assert max(ask(f"{url}/healthz")["tokens"] for _ in range(10)) < LONG, "the reply was cut when its reader went away"
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0
            assert not list(Path(ray_dir).glob("session_2*")), "the private Ray is gone"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
