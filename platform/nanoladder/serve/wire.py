"""Requests of /v1/chat/completions as they come in, and answers as they go out, in OpenAI's format.

What the model cannot do (tools, several choices, log-probabilities, penalties, other modalities) is refused by name instead of
being ignored; fields that change nothing about the text (user, metadata, store, …) are accepted.
"""

from __future__ import annotations

import difflib
import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from nanoladder.serve.errors import ApiError, bad_request

DEFAULT_TEMPERATURE = 0.6  # as nanoladder chat; OpenAI's 1.0 is hot for small models
DEFAULT_TOP_K = 50
DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 4  # OpenAI's limit
MAX_STOP_CHARS = 256
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what we cannot do, and the values that ask for nothing
    "n": (None, 1), "logprobs": (None, False), "top_logprobs": (None, 0), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0), "logit_bias": (None, {}), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,),
    "web_search_options": (None,), "function_call": (None, "none"),
}  # fmt: skip
IGNORED = (
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "safety_identifier", "prompt_cache_key",
)  # fmt: skip


def _text(content: Any) -> Any:
    """Content may be a list of text parts; other parts are left for the validator to refuse."""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(str(p.get("text", "")) for p in content)
    return content


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")  # a client sends back what it got: refusal, annotations, …
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[StrictStr, BeforeValidator(_text)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request. `top_k` and `truncate_history` are ours: OpenAI has neither."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr = ""
    messages: Annotated[list[Message], Field(min_length=1, max_length=2000)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    truncate_history: StrictBool | None = None  # leave out the oldest exchanges when the context is full, instead of an error

    @property
    def reply_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def plain_messages(self) -> list[dict[str, str]]:
        return [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in self.messages]


def parse_chat_request(body: bytes) -> ChatRequest:
    """A checked request. Raises ApiError 400 that names the field, the rule and what was given."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise bad_request(f"the body is not valid JSON: {e}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body is a {type(value).__name__}; it must be an object with messages", code="invalid_json")
    for name, neutral in NEUTRAL.items():
        if name in value and value.pop(name) not in neutral:
            raise bad_request(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
    value = {k: v for k, v in value.items() if k not in IGNORED}
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as e:
        raise _validation_error(e) from None
    if len(request.stops) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in request.stops):
        raise bad_request(f"stop may hold up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters", "stop")
    return request


def _validation_error(e: ValidationError) -> ApiError:
    first = e.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, ChatRequest.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return bad_request(f"unknown parameter {place!r}{hint}", place, "unknown_parameter")
    return bad_request(f"{place}: {first['msg']}", place)


class Answer:
    """The JSON of one reply, whole or in pieces."""

    def __init__(self, model: str, fingerprint: str) -> None:
        self._base = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._base["system_fingerprint"] = fingerprint

    def whole(self, text: str, finish: str, usage: dict[str, Any], dropped: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": usage, "dropped_messages": dropped}

    def piece(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        """One server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return sse({**self._base, "object": "chat.completion.chunk", "choices": [choice], **more})

    def usage_piece(self, usage: dict[str, Any]) -> str:
        return sse({**self._base, "object": "chat.completion.chunk", "choices": [], "usage": usage})


def sse(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
