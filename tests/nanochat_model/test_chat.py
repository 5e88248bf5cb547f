from pathlib import Path

import pytest
import torch
from tiny_run import RUNTIME, tiny_config, tiny_shards

from nanochat_model.chat import Chat, load_chat, sample_texts
from nanochat_model.conversations import render_conversation, render_prompt
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.tool_use import PythonCalls, reply_parts
from nanochat_model.train import pretrain


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_shards().tokenizer


@pytest.fixture
def model() -> GPT:
    """Random weights whose logits differ; text tokens only, unless a test says otherwise."""
    model = GPT(tiny_config(model__sequence_len=128, batch_tokens=128).model).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def slow_greedy(model: GPT, ids: list[int], count: int, stop: set[int]) -> list[int]:
    """The whole context again for every token."""
    out: list[int] = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + out]))[0, -1].argmax())
        if token in stop:
            break
        out.append(token)
    return out


def test_a_reply_streams_what_the_model_would_say(model: GPT, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer)
    stop = {tokenizer.special_id(t) for t in ("<|assistant_end|>", "<|bos|>", "<|user_start|>")}
    messages = [{"role": "user", "content": "abc é"}]
    expected = slow_greedy(model, render_prompt(messages, tokenizer), 12, stop)
    pieces = list(chat.reply("abc é", temperature=0, max_tokens=12))
    assert "".join(pieces) == tokenizer.decode(expected) and expected
    assert chat.turns == [[*render_prompt(messages, tokenizer)[1:], *expected, tokenizer.special_id("<|assistant_end|>")]]


def test_the_history_is_in_the_prompt(model: GPT, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer)
    first = "".join(chat.reply("ab", temperature=0, max_tokens=5))
    ids = chat._prompt(chat._question("cd"))
    before = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": first}]
    assert ids[: len(ids) - len(chat._question("cd"))] == [tokenizer.bos_id, *chat.turns[0]]
    whole = render_conversation({"messages": before}, tokenizer).ids.tolist()
    assert tokenizer.decode([tokenizer.bos_id, *chat.turns[0]]) == tokenizer.decode(whole)
    stop = {tokenizer.special_id(t) for t in ("<|assistant_end|>", "<|bos|>", "<|user_start|>")}
    assert "".join(chat.reply("cd", temperature=0, max_tokens=5)) == tokenizer.decode(slow_greedy(model, ids, 5, stop))
    chat.clear()
    assert chat._prompt(chat._question("cd"))[1:] == chat._question("cd")


def test_stops_at_the_end_token(model: GPT, tokenizer: Tokenizer) -> None:
    """With an unembedding that favours the end token along the very features, nothing is said."""
    end = tokenizer.special_id("<|assistant_end|>")
    chat = Chat(model, tokenizer)
    prompt = chat._prompt(chat._question("ab"))
    with torch.no_grad():
        model.lm_head.weight[end] = 5 * model.features(torch.tensor([prompt]))[0, -1]
    assert list(chat.reply("ab", temperature=0)) == []
    assert chat.turns[0][-1] == end and chat.turns[0].count(end) == 1


def test_seeds_and_temperature(model: GPT, tokenizer: Tokenizer) -> None:
    def say(**options) -> str:
        return "".join(Chat(model, tokenizer).reply("ab", max_tokens=12, **options))

    assert say(seed=1, temperature=1.0) == say(seed=1, temperature=1.0)
    assert len({say(seed=s, temperature=1.5) for s in range(4)}) > 1
    assert say(temperature=1.0, top_k=1, seed=3) == say(temperature=0)


def test_characters_of_several_bytes_arrive_whole(model: GPT, tokenizer: Tokenizer) -> None:
    """No piece ends inside a character, whatever bytes the tokens cut it into."""
    pieces = list(Chat(model, tokenizer).reply("ab", temperature=1.5, top_k=0, max_tokens=60, seed=5))
    assert all(isinstance(p, str) and p for p in pieces)
    ids = Chat(model, tokenizer)
    said = list(ids.reply_pieces("ab", temperature=1.5, top_k=0, max_tokens=60, seed=5))
    whole = reply_parts(ids.turns[0][len(ids._question("ab")) : -1], tokenizer)
    for kind in ("text", "python", "python_output"):  # a model of random weights writes markers too
        assert "".join(p.text for p in said if p.kind == kind) == "".join(text for k, text in whole if k == kind)
    assert "".join(pieces) == "".join(p.text for p in said if p.kind == "text")


def test_old_turns_leave_a_full_context(model: GPT, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer)
    chat.turns = [[1] * 50, [2] * 30, [3] * 20]
    ids = chat._prompt(chat._question("a"))
    assert ids.count(3) == 20 and ids.count(2) == 30 and ids.count(1) == 0
    assert len(list(chat.reply("a", temperature=0, max_tokens=500))) <= 128
    with pytest.raises(ConfigError, match="shorten the message"):
        list(chat.reply("xyz " * 100))


def test_a_system_message_goes_before_the_first_question(model: GPT, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer, system="be kind")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ab"}]
    assert chat._prompt(chat._question("ab")) == render_prompt(messages, tokenizer)


def test_loads_from_a_run_and_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pretrain(tiny_config(num_steps=2), RUNTIME, run_dir=tmp_path)
    chat = load_chat(str(tmp_path))
    assert chat.tokenizer.hash == tokenizer.hash
    texts = sample_texts(chat.model, chat.tokenizer, ["ab", "cde"])
    assert texts[0].startswith("ab") and texts[1].startswith("cde")


def test_the_tool_answers_finished_calls_only(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.special_id("<|python_start|>"), tokenizer.special_id("<|python_end|>")
    output = tokenizer.special_id("<|output_start|>"), tokenizer.special_id("<|output_end|>")
    tool = PythonCalls(tokenizer)
    call = [start, *tokenizer.encode("12 + 30"), end]
    assert tool(call) == [output[0], *tokenizer.encode("42"), output[1]]
    assert tool([7, *call, *tool(call), *call]) == tool(call)  # the last call alone
    for made in ([7], call[:-1], [end], [*call, *tool(call)], [*call, end], [start, end], [start, *tokenizer.encode("x"), end]):
        assert tool(made) == []
    parts = reply_parts([*tokenizer.encode("so "), *call, *tool(call), *tokenizer.encode("42")], tokenizer)
    assert parts == [("text", "so "), ("python", "12 + 30"), ("python_output", "42"), ("text", "42")]


def test_a_call_is_worked_out_while_replying(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that is made to write a call: its result is put into the reply, shown, and remembered."""
    script = [tokenizer.special_id("<|python_start|>"), *tokenizer.encode("6 * 7"), tokenizer.special_id("<|python_end|>")]
    wanted = [*script, *[0] * (2 + len(tokenizer.encode("42"))), *tokenizer.encode("ok"), tokenizer.special_id("<|assistant_end|>")]

    def next_logits(ids: torch.Tensor, cache: object, lengths: object = None) -> torch.Tensor:
        logits = torch.zeros(1, model.config.vocab_size)
        logits[0, wanted.pop(0)] = 1.0
        return logits

    monkeypatch.setattr(model, "next_logits", next_logits)
    chat = Chat(model, tokenizer)
    pieces = list(chat.reply_pieces("ab", temperature=0))
    assert [(k, "".join(p.text for p in pieces if p.kind == k)) for k in ("python", "python_output", "text")] == [
        ("python", "6 * 7"), ("python_output", "42"), ("text", "ok"),
    ]  # fmt: skip
    assert "6 * 7<|python_end|><|output_start|>42<|output_end|>ok<|assistant_end|>" in tokenizer.decode(chat.turns[0])


def test_a_reply_that_is_cut_short_stays_in_the_history(model: GPT, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer)
    pieces = chat.reply_pieces("ab", temperature=0, max_tokens=40)
    next(pieces)
    pieces.close()
    assert len(chat.turns) == 1 and chat.turns[0][-1] == tokenizer.special_id("<|assistant_end|>")
    assert "".join(chat.reply("cd", temperature=0, max_tokens=5)) is not None and len(chat.turns) == 2
