"""From a conversation to the ids that the model answers, within the room that there is."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_model.conversations import render_prompt
from nanochat_model.errors import ConfigError
from nanochat_model.tokenizer import Tokenizer
from nanoladder.serve.errors import bad_request

CHARS_PER_TOKEN = 64  # no text is denser: beyond this many characters a token nothing is tokenized, only refused
MIN_REPLY_TOKENS = 64  # a history is cut until this much (or a quarter of the context) is left for the reply


# A calculator call as it stands in the text of a reply, with what came back where something did.
_CALL = re.compile(r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    ids: list[int]
    room: int  # tokens that the reply may have
    dropped: int = 0  # messages left out at the front


def fit_prompt(messages: Sequence[dict[str, str]], tokenizer: Tokenizer, max_tokens: int, *, truncate: bool) -> Prompt:
    """The prompt of `messages` in a context of `max_tokens`, reply included. `truncate` leaves out the oldest exchanges (never a
    leading system message, never the last question) when the rest leaves no room. Raises ApiError 400."""
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    rest = list(messages[len(system) :])
    reserve = min(MIN_REPLY_TOKENS, max_tokens // 4) if truncate else 1
    most = (len(rest) - 1) // 2 if truncate else 0  # exchanges that may go

    def without(exchanges: int) -> tuple[list[int] | None, str]:
        """The ids of what is left, or None where its characters alone say that it is too long; and its size."""
        kept = [*system, *rest[2 * exchanges :]]
        num_chars = sum(len(m["content"]) for m in kept)
        if num_chars > CHARS_PER_TOKEN * max_tokens:
            return None, f"{num_chars} characters"
        ids = _render(kept, tokenizer)
        return ids, f"{len(ids)} tokens"

    def fits(ids: list[int] | None) -> bool:
        return ids is not None and len(ids) + reserve <= max_tokens

    gone, (ids, size) = 0, without(0)
    if most and not fits(ids):  # what is left only becomes shorter: a long history costs a few tries, not one an exchange
        gone = bisect.bisect_left(range(most), True, lo=1, key=lambda exchanges: fits(without(exchanges)[0]))
        ids, size = without(gone)
    if ids is not None and len(ids) < max_tokens:
        return Prompt(ids=ids, room=max_tokens - len(ids), dropped=2 * gone)
    message = f"the messages have {size}; the context holds {max_tokens} tokens with the reply; shorten them"
    raise bad_request(message, "messages", "context_length_exceeded")


def _render(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    parts = [{**m, "content": assistant_parts(m["content"])} if m["role"] == "assistant" else m for m in messages]
    try:
        return render_prompt(parts, tokenizer)
    except ConfigError as e:
        raise bad_request(str(e), "messages") from None


def assistant_parts(text: str) -> str | list[dict[str, Any]]:
    """An earlier reply with its calls as calls again, so that the model reads the tokens that it wrote."""
    parts: list[dict[str, Any]] = []
    end = 0
    for match in _CALL.finditer(text):
        parts.append({"type": "text", "text": text[end : match.start()]})
        parts.append({"type": "python", "text": match[1]})
        if match[2] is not None:
            parts.append({"type": "python_output", "text": match[2]})
        end = match.end()
    if not parts:
        return text
    parts.append({"type": "text", "text": text[end:]})
    return [p for p in parts if p["text"] or p["type"] != "text"]
