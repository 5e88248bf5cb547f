"""Conversations for supervised fine-tuning: reading, checking, and rendering to ids with a loss mask.

A conversation is {"messages": [{"role": …, "content": …}, …]}: user and assistant take turns, a leading system message is put
before the first user message. Content is text; an assistant's may also be a list of parts {"type": "text" | "python" |
"python_output", "text": …}: python is a call the model learns to make, python_output what came back.
Rendering follows nanochat (tokenizer.py render_conversation): the loss covers the assistant's text, its python calls with their
markers, and its end token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_model.errors import ConfigError
from nanochat_model.tasks.files import files_of, read_rows
from nanochat_model.tokenizer import Tokenizer

Conversation = Mapping[str, Any]
PART_TYPES = ("text", "python", "python_output")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One conversation as ids, int32 (n,), and whether each is learned, bool (n,)."""

    ids: np.ndarray
    mask: np.ndarray


def read_conversations(path: str | Path) -> list[Conversation]:
    """All conversations of a .jsonl or .parquet file, or of those in a folder. A line may also be a bare list of
    messages; a parquet file has a column `messages`. Raises ConfigError that names file and line (or row), rule and remedy."""
    rows = read_rows(files_of(Path(path)))
    found: list[Conversation] = [{"messages": checked_conversation(row, where)["messages"]} for where, row in rows]
    if not found:
        raise ConfigError(f"conversations {str(path)!r}: none found; give a .jsonl or .parquet file with at least one")
    return found


def checked_conversation(value: Any, where: str = "conversation") -> Conversation:
    """`value` if it is a conversation; otherwise a ConfigError that says what is wrong `where`."""
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{where}: no list "messages"; a conversation is {{"messages": [{{"role": "user", "content": "…"}}, …]}}')
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    if has_system and len(messages) < 2:
        raise ConfigError(f"{where}: a system message alone; a user message must follow it")
    for i, message in enumerate(messages):
        turn = ("system" if i == 0 else "user" if i % 2 else "assistant") if has_system else ("assistant" if i % 2 else "user")
        role = message.get("role") if isinstance(message, dict) else None
        if role != turn:
            raise ConfigError(f"{where}: message {i + 1} has role {role!r}, must be {turn!r}: user and assistant take turns")
        _check_content(message.get("content"), role, f"{where}: message {i + 1}")
    return value


def _check_content(content: Any, role: str, where: str) -> None:
    if isinstance(content, list) and role == "assistant":
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in PART_TYPES:
                raise ConfigError(f"{where} has a part of type {kind!r}; known: {', '.join(PART_TYPES)}")
        texts = [part.get("text") for part in content]
    else:
        texts = [content]
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"{where} ({role}) has content of type {type(text).__name__}; it must be text")
        try:
            text.encode("utf8")
        except UnicodeEncodeError as e:
            raise ConfigError(f"{where} is not UTF-8 (lone surrogate at character {e.start}); mend or remove it") from None


def _merged_messages(conversation: Conversation) -> list[Mapping[str, Any]]:
    """Messages with a leading system message put before the first user message."""
    messages = list(conversation["messages"])
    if messages[0]["role"] != "system":
        return messages
    merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": merged}, *messages[2:]]


def render_conversation(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    """Ids of a checked conversation and which of them are learned."""
    pieces: list[tuple[Sequence[int], bool]] = [([tokenizer.bos_id], False)]

    def add(text: str, start: str, end: str, *, learned: bool, start_learned: bool = False, end_learned: bool = False) -> None:
        pieces.append(([tokenizer.special_id(start)], start_learned))
        pieces.append((tokenizer.encode(text), learned))
        pieces.append(([tokenizer.special_id(end)], end_learned))

    for message in _merged_messages(conversation):
        content = message["content"]
        if message["role"] == "user":
            add(content, "<|user_start|>", "<|user_end|>", learned=False)
            continue
        pieces.append(([tokenizer.special_id("<|assistant_start|>")], False))
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                pieces.append((tokenizer.encode(part["text"]), True))
            elif part["type"] == "python":
                add(part["text"], "<|python_start|>", "<|python_end|>", learned=True, start_learned=True, end_learned=True)
            else:
                add(part["text"], "<|output_start|>", "<|output_end|>", learned=False)
        pieces.append(([tokenizer.special_id("<|assistant_end|>")], True))
    ids = np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces])
    return Rendered(ids=ids, mask=np.repeat([learned for _, learned in pieces], [len(ids) for ids, _ in pieces]))


def render_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Ids that end with <|assistant_start|>, for the assistant to answer the last (user) message. Raises ConfigError."""
    conversation = checked_conversation({"messages": list(messages)}, "chat")
    if messages[-1]["role"] != "user":
        raise ConfigError(f"chat: the last message has role {messages[-1]['role']!r}, must be 'user' for the assistant to answer")
    return [*render_conversation(conversation, tokenizer).ids.tolist(), tokenizer.special_id("<|assistant_start|>")]
