"""A loaded model with its worker: takes checked requests, gives texts. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_model.batching import Batcher, Event, Request
from nanochat_model.checkpoint import load_model, resolve, tokenizer_dir
from nanochat_model.config import GPTConfig
from nanochat_model.device import bf16_is_fast, choose_device, tune_process
from nanochat_model.engine import prepare_inference
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.sampling import Sampling
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.tool_use import PythonCalls
from nanoladder.serve.card import model_card
from nanoladder.serve.errors import ApiError
from nanoladder.serve.options import ModelOptions
from nanoladder.serve.prompt import Prompt, fit_prompt
from nanoladder.serve.text import TextStream
from nanoladder.serve.wire import DEFAULT_TEMPERATURE, DEFAULT_TOP_K, ChatRequest
from nanoladder.serve.worker import QueueFull, Ticket, Worker, WorkerStopped

MEMORY_SHARE = 0.25  # of what is free, for the cache, where the number of rows is not given
MAX_ROWS = 32  # then
RETRY_SECONDS = "2"


@dataclass(frozen=True)
class Piece:
    """New text of a reply; the last has the finish reason and the number of tokens made."""

    text: str
    finish: str | None = None
    num_tokens: int = 0


class Reply:
    """One reply under way: iterate over its pieces, and `close` it in any case."""

    def __init__(self, prompt: Prompt, seed: int, text: TextStream, stop_ids: frozenset[int]) -> None:
        self.prompt, self.seed = prompt, seed
        self._text, self._stop_ids = text, stop_ids
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.ticket: Ticket | None = None

    def sink(self, event: Event | Exception) -> None:
        """Called in the worker's thread. A loop that has closed has nobody left to tell."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it becomes certain; what has come in meanwhile is one piece. Raises ApiError 500 or 503 when the batch failed."""
        made = 0
        while True:
            event = await self._events.get()
            new, finish = "", None
            while True:
                if isinstance(event, Exception):
                    raise _failure(event)
                if event.token is not None and event.token not in self._stop_ids:
                    made += 1
                    new += self._text.push(event.token)
                finish = "stop" if self._text.stopped else event.finish
                if finish or self._events.empty():
                    break
                event = self._events.get_nowait()
            if finish:
                new += self._text.finish()
                yield Piece(new, "stop" if self._text.stopped else finish, made)
                return
            if new:
                yield Piece(new, None, made)

    def close(self) -> None:
        if self.ticket is not None:
            self.ticket.cancel()


def _failure(error: Exception) -> ApiError:
    if isinstance(error, WorkerStopped):
        return ApiError(503, "the server is shutting down; try again later", code="shutting_down")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, f"the model failed ({type(error).__name__}); the server's log says more", code="model_failed")


class Service:
    """The model of one server process. `start` before use, `stop` at the end."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, options: ModelOptions, card: dict[str, Any]) -> None:
        self.options, self.card, self.tokenizer = options, card, tokenizer
        self.max_tokens = options.max_tokens or model.config.sequence_len
        rows = options.max_rows or default_rows(model, self.max_tokens)
        prepare_inference(model)
        self.worker = Worker(
            lambda: Batcher(model, max_rows=rows, max_tokens=self.max_tokens),
            max_queue=options.max_queue,
            num_threads=options.num_threads,
        )
        self._stop_ids = frozenset(tokenizer.special_id(t) for t in ("<|assistant_end|>", "<|bos|>", "<|user_start|>"))
        card["serving"] = {"max_rows": rows, "max_queue": options.max_queue, "max_tokens": self.max_tokens}
        card["serving"] |= {"max_reply_tokens": options.max_reply_tokens, "dtype": str(model.compute_dtype).removeprefix("torch.")}
        card["serving"] |= {"device": model.lm_head.weight.device.type}

    @property
    def name(self) -> str:
        return self.card["id"]

    @property
    def fingerprint(self) -> str:
        return self.card["hash"]

    def start(self) -> Service:
        self.worker.start()
        return self

    def stop(self) -> None:
        self.worker.stop()

    def reply(self, request: ChatRequest) -> Reply:
        """Accept a request; raises ApiError (400, 404, 429, 503). Needs a running event loop."""
        if request.model not in ("", self.name):
            message = f"no model {request.model!r} here; this server has {self.name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        prompt = fit_prompt(request.plain_messages(), self.tokenizer, self.max_tokens, truncate=bool(request.truncate_history))
        seed = secrets.randbits(32) if request.seed is None else request.seed
        sampling = Sampling(
            temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
            top_k=DEFAULT_TOP_K if request.top_k is None else request.top_k,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed,
        )
        wanted = Request(
            prompt=prompt.ids,
            max_tokens=min(request.reply_tokens, prompt.room, self.options.max_reply_tokens),
            sampling=sampling,
            stop_ids=self._stop_ids,
            tool=PythonCalls(self.tokenizer),
        )
        reply = Reply(prompt, seed, TextStream(self.tokenizer, request.stops), self._stop_ids)
        try:
            reply.ticket = self.worker.submit(wanted, reply.sink)
        except QueueFull:
            raise ApiError(
                429,
                "the server is busy and its queue is full; try again later",
                code="queue_full",
                headers={"Retry-After": RETRY_SECONDS},
            ) from None
        except WorkerStopped as e:
            raise _failure(e) from None
        return reply


def load_service(options: ModelOptions) -> Service:
    """Model, tokenizer and card of a checkpoint. Raises ConfigError."""
    tune_process(options.num_threads)
    path = resolve(options.checkpoint)
    device = choose_device(options.device)
    model = load_model(path, device=str(device), dtype=_dtype(options.dtype, device))
    tokenizer = Tokenizer.load(tokenizer_dir(path))
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; give its own"
        )
    return Service(model, tokenizer, options, model_card(path, name=options.name))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and bf16_is_fast("cuda") else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def row_bytes(config: GPTConfig, max_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one row of the cache."""
    return 2 * config.depth * max_tokens * config.kv_dim * dtype.itemsize


def default_rows(model: GPT, max_tokens: int) -> int:
    """Rows that fit a quarter of the memory that is free now, 1 to 32."""
    device = model.lm_head.weight.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(MAX_ROWS, int(MEMORY_SHARE * free) // row_bytes(model.config, max_tokens, model.compute_dtype)))
