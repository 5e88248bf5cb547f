"""Conversations: what is learned, how rows are packed, what bad files say, and that the demo's own answers are right."""

from __future__ import annotations

import builtins
import importlib.util
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_text import texts

from nanochat_model.conversation_set import IGNORED, ConversationLoader, ConversationSet
from nanochat_model.conversations import checked_conversation, read_conversations, render_conversation, render_prompt
from nanochat_model.demo_conversations import demo_conversations, write_demo_conversations
from nanochat_model.demo_facts import EXPRESSIONS, PYTHON_NAMES
from nanochat_model.errors import ConfigError
from nanochat_model.mixture import is_held_out
from nanochat_model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(texts(40), 320)


@pytest.fixture(scope="module")
def conversations() -> list[Any]:
    return demo_conversations(200)


def talk(*contents: Any, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "assistant" if i % 2 else "user", "content": c} for i, c in enumerate(contents)]
    return {"messages": [*([{"role": "system", "content": system}] if system is not None else []), *messages]}


def learned(conversation: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Decoded text with what is learned in [brackets]."""
    rendered = render_conversation(conversation, tokenizer)
    out, inside = "", False
    for i, m in zip(rendered.ids.tolist(), rendered.mask.tolist(), strict=True):
        out += ("[" if m and not inside else "") + ("]" if inside and not m else "") + tokenizer.decode([i])
        inside = m
    return out + ("]" if inside else "")


def test_the_loss_covers_the_assistants_words_and_end_alone(tokenizer: Tokenizer) -> None:
    found = learned(talk("Hi", "Yo", "Why <|bos|>?", "So."), tokenizer)
    assert found == (
        "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>[Yo<|assistant_end|>]"
        "<|user_start|>Why <|bos|>?<|user_end|><|assistant_start|>[So.<|assistant_end|>]"
    )
    ids = render_conversation(talk("Why <|bos|>?", "x"), tokenizer).ids.tolist()
    assert ids.count(tokenizer.bos_id) == 1  # text that looks like a special token is text


def test_python_calls_are_learned_and_their_output_is_not(tokenizer: Tokenizer) -> None:
    parts = [
        {"type": "text", "text": "Let me see"}, {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42!"},
    ]  # fmt: skip
    assert learned(talk("6*7?", parts), tokenizer) == (
        "<|bos|><|user_start|>6*7?<|user_end|><|assistant_start|>[Let me see<|python_start|>6*7<|python_end|>]"
        "<|output_start|>42<|output_end|>[42!<|assistant_end|>]"
    )


def test_a_system_message_joins_the_first_user_message(tokenizer: Tokenizer) -> None:
    with_system = render_conversation(talk("Hi", "Yo", system="Be brief."), tokenizer)
    assert with_system.ids.tolist() == render_conversation(talk("Be brief.\n\nHi", "Yo"), tokenizer).ids.tolist()


def test_a_prompt_ends_where_the_assistant_begins(tokenizer: Tokenizer) -> None:
    whole = render_conversation(talk("Hi", "Yo", "Why?", "So."), tokenizer).ids.tolist()
    prompt = render_prompt(talk("Hi", "Yo", "Why?")["messages"], tokenizer)
    assert whole[: len(prompt)] == prompt and prompt[-1] == tokenizer.special_id("<|assistant_start|>")
    with pytest.raises(ConfigError, match="last message has role 'assistant'"):
        render_prompt(talk("Hi", "Yo")["messages"], tokenizer)


def loader_of(conversations: list[Any], tokenizer: Tokenizer, T: int = 128, rows: int = 4, seed: int = 0) -> ConversationLoader:
    return ConversationLoader(ConversationSet.render(conversations, tokenizer), sequence_len=T, rows_per_batch=rows, seed=seed)


def test_an_epoch_holds_every_conversation_whole_and_once(conversations: list[Any], tokenizer: Tokenizer) -> None:
    rendered = [render_conversation(c, tokenizer) for c in conversations]
    T = max(len(r.ids) for r in rendered) - 1  # the longest fills a row
    load = loader_of(conversations, tokenizer, T=T)
    assert load.num_truncated == 0
    inputs, targets = load.epoch()
    found: Counter[tuple[int, ...]] = Counter()
    for row_in, row_out in zip(inputs.tolist(), targets.tolist(), strict=True):
        row = [*row_in, row_out[-1] if row_out[-1] != IGNORED else tokenizer.bos_id]  # every conversation ends with a learned token
        starts = [i for i, t in enumerate(row) if t == tokenizer.bos_id]
        found.update(tuple(row[a:b]) for a, b in itertools.pairwise([*starts, len(row)]))
        assert all(target in (IGNORED, token) for target, token in zip(row_out, row[1:], strict=True))
    del found[tokenizer.bos_id,]  # padding
    assert found == Counter(tuple(r.ids.tolist()) for r in rendered)
    assert (targets != IGNORED).sum() == sum(int(r.mask.sum()) for r in rendered) == load.conversations.num_supervised_tokens


def test_masks_of_a_row_are_those_of_its_conversations(tokenizer: Tokenizer) -> None:
    a, b = talk("Hi", "Yo"), talk("No", "Why not?")
    load = loader_of([a, b], tokenizer, T=100, rows=1)
    order = [a, b] if load.batch(0)[0][0].tolist()[: len(render_conversation(a, tokenizer).ids)] == list(
        render_conversation(a, tokenizer).ids
    ) else [b, a]  # fmt: skip
    ids = np.concatenate([render_conversation(c, tokenizer).ids for c in order])
    mask = np.concatenate([render_conversation(c, tokenizer).mask for c in order])
    inputs, targets = load.batch(0)
    n = len(ids)
    assert inputs[0, :n].tolist() == ids.tolist() and set(inputs[0, n:]) == {tokenizer.bos_id}
    assert targets[0, : n - 1].tolist() == np.where(mask[1:], ids[1:], IGNORED).tolist()
    assert set(targets[0, n - 1 :]) == {IGNORED}


def test_batches_are_a_pure_function_of_set_seed_and_number(conversations: list[Any], tokenizer: Tokenizer) -> None:
    through = loader_of(conversations, tokenizer)
    expected = [through.batch(k) for k in range(60)]
    assert through.rows_per_epoch < 60 * 4 // 2  # several epochs
    for k in (59, 0, 31):
        for world_size in (1, 3, 5):
            fresh = loader_of(conversations, tokenizer)
            parts = [fresh.batch(k, rank, world_size) for rank in range(world_size)]
            for side in (0, 1):
                assert (np.concatenate([p[side] for p in parts]) == expected[k][side]).all()
    assert (loader_of(conversations, tokenizer, seed=1).batch(0)[0] != expected[0][0]).any()
    assert loader_of(conversations[:-1], tokenizer).conversations.hash != through.conversations.hash


def test_a_batch_without_anything_to_learn_is_possible(tokenizer: Tokenizer) -> None:
    inputs, targets = loader_of([{"messages": [{"role": "user", "content": "Hm"}]}], tokenizer, T=16, rows=2).batch(3)
    assert inputs.shape == (2, 16) and (targets == IGNORED).all()


def test_long_conversations_are_cut_at_their_end_and_counted(tokenizer: Tokenizer) -> None:
    long = talk("x " * 50, "y " * 50)
    load = loader_of([long], tokenizer, T=40, rows=1)
    assert load.num_truncated == 1
    assert load.batch(0)[0][0].tolist() == render_conversation(long, tokenizer).ids[:40].tolist()


def test_jsonl_lists_and_parquet_read_alike(tmp_path: Path) -> None:
    found = [talk("Hi", "Yo"), talk("é", "中", "a", "b", system="s")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(c) for c in found) + "\n\n", encoding="utf8")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(c["messages"]) for c in found), encoding="utf8")
    pq.write_table(pa.table({"messages": [c["messages"] for c in found], "source": ["x", "y"]}), tmp_path / "c.parquet")
    for name in "abc":
        (path,) = tmp_path.glob(f"{name}.*")
        assert read_conversations(path) == found
    assert read_conversations(tmp_path) == found * 3


BAD = [
    ('{"messages": []}', 'no list "messages"'),
    ('{"text": "x"}', 'no list "messages"'),
    ("3", "not a JSON object"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "message 1 has role 'assistant', must be 'user'"),
    ('{"messages": [{"role": "system", "content": "x"}]}', "a system message alone"),
    (json.dumps(talk("a", "b")).replace("assistant", "user"), "message 2 has role 'user', must be 'assistant'"),
    (json.dumps(talk(3)), r"message 1 \(user\) has content of type int; it must be text"),
    (json.dumps(talk([{"type": "text", "text": "x"}])), r"message 1 \(user\) has content of type list"),
    (
        json.dumps(talk("a", [{"type": "image", "text": "x"}])),
        "message 2 has a part of type 'image'; known: text, python, python_out",
    ),
    (json.dumps(talk("a", [{"type": "text"}])), r"message 2 \(assistant\) has content of type NoneType"),
    (json.dumps(talk("\ud800")), "message 1 is not UTF-8"),
    ('{"messages": [', r"not valid JSON at character 15 \(cut short\?\)"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_conversations_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(talk("Hi", "Yo")) + "\n" + line + "\n", encoding="utf8")
    with pytest.raises(ConfigError, match=rf"a\.jsonl: line 2: {message}"):
        read_conversations(path)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_conversations(tmp_path / "none")
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    with pytest.raises(ConfigError, match="none found"):
        read_conversations(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 1: not UTF-8"):
        read_conversations(tmp_path)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet: row 0: no list \"messages\""):
        read_conversations(tmp_path / "b.parquet")


def test_demo_conversations_are_valid_different_and_repeatable(tmp_path: Path) -> None:
    found = demo_conversations()
    assert len(found) == 1500 and len({json.dumps(c) for c in found}) == 1500
    assert found == demo_conversations() and found != demo_conversations(seed=1)
    assert all(checked_conversation(c) for c in found)
    train, val = write_demo_conversations(tmp_path)
    assert read_conversations(train) + read_conversations(val) != [] and len(read_conversations(val)) == 75
    assert sorted(map(json.dumps, read_conversations(train) + read_conversations(val))) == sorted(map(json.dumps, found))
    with pytest.raises(ConfigError, match=r"there are \d+; ask for 1 to"):
        demo_conversations(10**6)


def test_every_answer_of_the_demo_that_can_be_computed_is_right() -> None:
    pairs = [
        (m[i]["content"], m[i + 1]["content"])
        for c in demo_conversations(2000)
        for m in [[x for x in c["messages"] if x["role"] != "system"]]
        for i in range(0, len(m), 2)
    ]
    sums = evaluated = 0
    for question, answer in pairs:
        text = answer if isinstance(answer, str) else answer[-1]["text"]
        if found := re.fullmatch(r"(\d+ [-+*] \d+) = (-?\d+)\.", text):
            assert eval(found[1]) == int(found[2]) and found[1] in question
            sums += 1
            if not isinstance(answer, str):
                assert [p["type"] for p in answer] == ["python", "python_output", "text"]
                assert eval(answer[0]["text"]) == int(answer[1]["text"]) == int(found[2])
        elif (found := re.fullmatch(r"(.+) gives (.+)\.", text)) and found[1] in EXPRESSIONS:
            assert repr(eval(found[1])) == found[2] and found[1] in question
            evaluated += 1
    assert sums > 300 and evaluated > 100


def test_every_python_name_of_the_demo_exists() -> None:
    for name, says in PYTHON_NAMES.items():
        if hasattr(builtins, name):
            value = getattr(builtins, name)
            assert says.startswith("is raised") == (isinstance(value, type) and issubclass(value, BaseException)) or "base" in says
        else:
            assert importlib.util.find_spec(name) is not None and re.match("is a (module|package) ", says), name


def test_the_split_is_by_content() -> None:
    found = demo_conversations(300)
    held_out = [is_held_out(c["messages"], 0.1) for c in found]
    assert 10 <= sum(held_out) <= 55
    assert [is_held_out(c["messages"], 0.1) for c in found[::-1]] == held_out[::-1]
