"""Tokens a second and latencies of `nanoladder serve` under 1, 8 and 32 streams at a time.

    python bench/serve.py [--checkpoint PATH] [--streams 1 8 32] [--seconds 15] [--one-at-a-time] [--json PATH]

Without --checkpoint a model of random weights is written to a temporary folder: nanochat's shape at --depth, and a tokenizer
learned from Python's own sources. The server is a process of its own; each stream asks again as soon as its reply has ended
(prompts of about 100 tokens, replies of --max-tokens). `first token` is the time from sending a request to its first text,
waiting included; `gap` the time between two pieces of text of one reply. --one-at-a-time serves with one row, for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

PROMPT = "Explain how a ladder is climbed, one step after another, and why each step must hold. " * 4
TOKENIZER_BYTES = 4_000_000  # of Python's sources


def write_checkpoint(folder: Path, depth: int, vocab_size: int) -> Path:
    from nanochat_model.checkpoint import CheckpointState, save_checkpoint
    from nanochat_model.config import GPTConfig
    from nanochat_model.gpt import GPT
    from nanochat_model.tokenizer import Tokenizer

    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        texts.append(path.read_text(encoding="utf8", errors="replace"))
        size += len(texts[-1])
        if size > TOKENIZER_BYTES:
            break
    Tokenizer.train(texts, vocab_size).save(folder / "tokenizer")
    config = GPTConfig.from_depth(depth, vocab_size=vocab_size)
    save_checkpoint(folder / "checkpoints", CheckpointState(step=0, model=config), GPT(config).init_weights(0).state_dict())
    return folder


@contextmanager
def server(checkpoint: str, rows: int, threads: int, dtype: str) -> Iterator[str]:
    command = [sys.executable, "-c", "from nanoladder.cli import main; main()", "serve", checkpoint, "--port", "0", "--json"]
    command += ["--max-rows", str(rows), "--num-threads", str(threads), "--dtype", dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines: list[str] = []
        assert process.stdout is not None
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            if not lines[-1]:
                raise SystemExit("the server did not start")
        yield json.loads("".join(lines))["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@dataclass
class Seen:
    """What the streams of one run saw."""

    first: list[float] = field(default_factory=list)  # seconds
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    replies: int = 0


async def one_reply(session: aiohttp.ClientSession, url: str, seed: int, max_tokens: int, seen: Seen) -> None:
    body = {
        "messages": [{"role": "user", "content": f"{seed}: {PROMPT}"}], "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": max_tokens, "temperature": 0.8, "seed": seed,
    }  # fmt: skip
    last = started = time.perf_counter()
    has_text = False
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            now = time.perf_counter()
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                (seen.gaps if has_text else seen.first).append(now - (last if has_text else started))
                last, has_text = now, True
            elif event.get("usage"):
                seen.tokens += event["usage"]["completion_tokens"]
                seen.prompt_tokens += event["usage"]["prompt_tokens"]
                seen.replies += 1


async def load(url: str, streams: int, seconds: float, max_tokens: int) -> tuple[Seen, float]:
    """Every stream asks until `seconds` are over; replies under way then are waited for and counted."""
    seen, started = Seen(), time.perf_counter()

    async def stream(session: aiohttp.ClientSession, number: int) -> None:
        seed = number * 1000
        while time.perf_counter() - started < seconds:
            await one_reply(session, url, seed, max_tokens, seen)
            seed += 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        await one_reply(session, url, 1, 8, Seen())  # warm
        started = time.perf_counter()
        await asyncio.gather(*(stream(session, i) for i in range(streams)))
    return seen, time.perf_counter() - started


def figures(seen: Seen, seconds: float) -> dict[str, Any]:
    def ms(values: list[float], q: float) -> float:
        return round(1000 * float(np.percentile(values, q)), 1)

    facts: dict[str, Any] = {"tokens_per_second": round(seen.tokens / seconds, 1), "replies": seen.replies}
    facts |= {"prompt_tokens_per_second": round(seen.prompt_tokens / seconds, 1), "seconds": round(seconds, 1)}
    for name, values in (("first_ms", seen.first), ("gap_ms", seen.gaps)):
        facts |= {f"{name}_p{q}": ms(values, q) for q in (50, 95, 99)}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--num-threads", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or str(write_checkpoint(Path(folder), args.depth, args.vocab_size))
        with server(checkpoint, 1 if args.one_at_a_time else args.max_rows, args.num_threads, args.dtype) as url:
            for streams in args.streams:
                facts = {"streams": streams, **figures(*asyncio.run(load(url, streams, args.seconds, args.max_tokens)))}
                results.append(facts)
                first, gap = ([facts[f"{n}_p{q}"] for q in (50, 95, 99)] for n in ("first_ms", "gap_ms"))
                print(
                    f"{streams:3d} streams  {facts['tokens_per_second']:8.1f} tokens/s  first token {first} ms  gap {gap} ms"
                    f"  (p50, p95, p99; {facts['replies']} replies)",
                    flush=True,
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": str(args.json)}, "results": results}, indent=1))


if __name__ == "__main__":
    main()
