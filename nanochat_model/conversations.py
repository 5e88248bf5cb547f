"""Conversations for supervised fine-tuning: reading, rendering to ids with a loss mask, and padded best-fit batches.

A conversation is {"messages": [{"role": …, "content": …}, …]}: user and assistant take turns, a leading system message is put
before the first user message. Content is text; an assistant's may also be a list of parts {"type": "text" | "python" |
"python_output", "text": …}: python is a call the model learns to make, python_output what came back.
Rendering follows nanochat (tokenizer.py render_conversation): the loss covers the assistant's text, its python calls with their
markers, and its end token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_model import packing as packers
from nanochat_model.demo_conversations import demo_conversations, write_demo_conversations
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash
from nanochat_model.loader import rank_rows
from nanochat_model.tokenizer import Tokenizer

__all__ = [
    "ConversationLoader", "ConversationSet", "Rendered", "demo_conversations", "read_conversations", "render_conversation",
    "render_prompt", "split_conversations", "write_demo_conversations",
]  # fmt: skip
Conversation = Mapping[str, Any]
IGNORED = -1  # target that no loss is taken of
PART_TYPES = ("text", "python", "python_output")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One conversation as ids, int32 (n,), and whether each is learned, bool (n,)."""

    ids: np.ndarray
    mask: np.ndarray


def read_conversations(path: str | Path) -> list[Conversation]:
    """All conversations of a .jsonl or .parquet file, or of those in a folder. A line may also be a bare list of messages;
    a parquet file has a column `messages`. Raises ConfigError that names file and line (or row), the rule and the remedy."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"conversations {str(path)!r} do not exist; give a .jsonl or .parquet file, or a folder of them")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet")) if path.is_dir() else [path]
    found = [conversation for file in files for conversation in _read_file(file)]
    if not found:
        raise ConfigError(f"conversations {str(path)!r}: none found; give a .jsonl or .parquet file with at least one")
    return found


def _read_file(path: Path) -> Iterator[Conversation]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                value = json.loads(line.decode("utf8"))
            except UnicodeDecodeError as e:
                raise ConfigError(f"{where}: not UTF-8 (byte {e.start}); convert or remove the line") from None
            except json.JSONDecodeError as e:
                raise ConfigError(f"{where}: not valid JSON at character {e.pos} (cut short?); mend or remove the line") from None
            yield checked_conversation({"messages": value} if isinstance(value, list) else value, where)


def _read_parquet(path: Path) -> Iterator[Conversation]:
    import pyarrow as pa  # only parquet needs it
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise ConfigError(f"{path}: not a readable parquet file ({str(e).splitlines()[0]}); replace or remove it") from None
    if "messages" not in file.schema_arrow.names:
        raise ConfigError(f"{path}: no column 'messages', only {', '.join(map(repr, file.schema_arrow.names))}; rename the column")
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=["messages"]):
        for messages in batch.column(0).to_pylist():
            yield checked_conversation({"messages": messages}, f"{path}: row {row}")
            row += 1


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


def split_conversations(
    conversations: Iterable[Conversation], val_fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and validation conversations, by hash of their content (order does not matter)."""
    train: list[Conversation] = []
    val: list[Conversation] = []
    for c in conversations:
        (val if int(content_hash(["split", c["messages"]]), 16) / 16**16 < val_fraction else train).append(c)
    return train, val


class ConversationSet:
    """Rendered conversations, one after another. `hash` names texts and tokenizer."""

    def __init__(self, conversations: Sequence[Conversation], tokenizer: Tokenizer) -> None:
        if not conversations:
            raise ConfigError("no conversations to train on; give at least one")
        rendered = [render_conversation(c, tokenizer) for c in conversations]
        self.hash = content_hash([tokenizer.hash, [c["messages"] for c in conversations]])
        self.bos_id = tokenizer.bos_id
        self.ids = np.concatenate([r.ids for r in rendered])
        self.mask = np.concatenate([r.mask for r in rendered])
        self.lengths = np.array([len(r.ids) for r in rendered], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_supervised_tokens(self) -> int:
        return int(self.mask.sum())


class ConversationLoader:
    """Batches of rows of T + 1 ids, packed best-fit and padded with BOS, never cropped; a conversation longer than a row is cut
    at its end (`num_truncated`). Global batch k is a pure function of (hash, sequence_len, seed, k)."""

    def __init__(self, conversations: ConversationSet, *, sequence_len: int, rows_per_batch: int, seed: int = 0) -> None:
        if sequence_len < 1 or rows_per_batch < 1:
            raise ConfigError(f"sequence_len {sequence_len} and rows_per_batch {rows_per_batch} must be at least 1")
        self.conversations, self.sequence_len, self.rows_per_batch, self.seed = conversations, sequence_len, rows_per_batch, seed
        self.num_truncated = int((conversations.lengths > sequence_len + 1).sum())
        self._lengths = np.minimum(conversations.lengths, sequence_len + 1)
        self._plans: dict[int, packers.RowPlan] = {}
        self._ends: list[int] = []  # the row after the last one of each epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch (another shuffle may pack into a few more or fewer)."""
        return self._plan(0).num_rows

    def batch(self, k: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of this rank's rows of global batch k: int64 (rows, T); targets not learned are -1, which may be
        all of them."""
        first, last = rank_rows(self.rows_per_batch, rank, world_size)
        base = k * self.rows_per_batch
        rows = range(base + first, base + last)
        return self._render([self._locate(row) for row in rows])

    def epoch(self) -> tuple[np.ndarray, np.ndarray]:
        """Every conversation once, as the rows of the first epoch: for validation."""
        return self._render([(0, row) for row in range(self.rows_per_epoch)])

    def _locate(self, row: int) -> tuple[int, int]:
        """Epoch of a row, and its number within it."""
        while not self._ends or self._ends[-1] <= row:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._plan(len(self._ends)).num_rows)
        epoch = int(np.searchsorted(self._ends, row, side="right"))
        return epoch, row - (self._ends[epoch - 1] if epoch else 0)

    def _plan(self, epoch: int) -> packers.RowPlan:
        if epoch not in self._plans:
            while len(self._plans) >= 2:
                del self._plans[next(iter(self._plans))]
            key = (self.conversations.hash, self.seed, epoch)
            self._plans[epoch] = packers.best_fit_padded(self._lengths, self.sequence_len, *key)
        return self._plans[epoch]

    def _render(self, rows: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        data = self.conversations
        ids = np.full((len(rows), self.sequence_len + 1), data.bos_id, np.int64)
        learned = np.zeros(ids.shape, bool)
        for i, (epoch, row) in enumerate(rows):
            plan, at = self._plan(epoch), 0
            for span in range(plan.row_ptr[row], plan.row_ptr[row + 1]):
                start, length = data.starts[plan.doc[span]], plan.length[span]
                ids[i, at : at + length] = data.ids[start : start + length]
                learned[i, at : at + length] = data.mask[start : start + length]
                at += length
        return ids[:, :-1].copy(), np.where(learned[:, 1:], ids[:, 1:], IGNORED)
