"""The tokenizer against a slow, obvious BPE; round trips; special tokens; what bad files say."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import re
import sys
import threading
import types
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_text import texts
from tokenizers import Regex, pre_tokenizers

from nanochat_model.errors import ConfigError
from nanochat_model.tokenizer import META_FILE, SPECIAL_TOKENS, Tokenizer, byte_characters
from nanochat_model.tokenizer_import import from_ranks, import_nanochat_tokenizer, nanochat_pickle
from nanochat_model.word_split import SPLIT_PATTERN, split_words, stand_in

# Characters whose class no version of Unicode has changed, of every kind that the split rule tells apart.
POOL = "abz sS'’tTlLvVeE019½²Ⅷ٣ \t\n\r\x0b\x0c\x85\xa0\u2003\u2028éßſKλ中一(){}#!,.<|>_\u0301\u200d\x1c\x1f\x00\U0001f600\U00010330"


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(POOL) for _ in range(rng.randint(0, length)))


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    rng = random.Random(1)
    return texts(60) + [random_text(rng, 60) for _ in range(40)]


@pytest.fixture(scope="module")
def tokenizer(corpus: list[str]) -> Tokenizer:
    return Tokenizer.train(corpus, 512)


def reference_words(text: str) -> list[str]:
    """The split rule by Python's re, its classes written out from unicodedata for the characters of `text`."""
    letters = "".join(re.escape(c) for c in set(text) if unicodedata.category(c)[0] == "L") or "\U0010ffff"
    numbers = "".join(re.escape(c) for c in set(text) if unicodedata.category(c)[0] == "N") or "\U0010ffff"
    spaces = "\t\n\x0b\x0c\r \x85\xa0\u2003\u2028"
    pattern = SPLIT_PATTERN.replace(r"[^\r\n\p{L}\p{N}]", f"[^\r\n{letters}{numbers}]").replace(
        r"[^\s\p{L}\p{N}]", f"[^{spaces}{letters}{numbers}]"
    )
    pattern = pattern.replace(r"\p{L}", f"[{letters}]").replace(r"\p{N}", f"[{numbers}]")
    return re.findall(pattern.replace(r"(?!\S)", f"(?![^{spaces}])").replace(r"\s", f"[{spaces}]"), text)


def reference_encode(text: str, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """BPE as one would explain it: in every word, merge the pair of lowest rank, leftmost first, until none is left."""
    rank = {pair: i for i, pair in enumerate(merges)}
    tokens: list[bytes] = []
    for word in reference_words(text):
        parts = [bytes([b]) for b in word.encode()]
        while True:
            known = [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in rank]
            if not known:
                break
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        tokens += parts
    return tokens


def as_bytes(text: str) -> bytes:
    return bytes(byte_characters().index(c) for c in text)


def test_ids_are_those_of_a_slow_bpe(tokenizer: Tokenizer, corpus: list[str]) -> None:
    merges = [(as_bytes(a), as_bytes(b)) for a, b in tokenizer._merges]
    rng = random.Random(2)
    for text in [*corpus[:6], *corpus[60:], *(random_text(rng, 80) for _ in range(300))]:
        assert [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)] == reference_encode(text, merges), ascii(text)


def test_training_merges_the_most_frequent_pair_first() -> None:
    text = "low low low low low lower lower newest newest newest newest newest newest widest widest widest " * 3
    words = Counter(tuple(bytes([b]) for b in w.encode()) for w in reference_words(text))
    merges = []
    for _ in range(12):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        best = max(pairs.values())
        merges.append((best, {p for p, n in pairs.items() if n == best}))
        chosen = Tokenizer.train([text], 265 + len(merges))._merges[-1]
        a, b = as_bytes(chosen[0]), as_bytes(chosen[1])
        assert (a, b) in merges[-1][1]
        joined: Counter[tuple[bytes, ...]] = Counter()
        for word, n in words.items():
            parts, i = list(word), 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (a, b):
                    parts[i : i + 2] = [a + b]
                i += 1
            joined[tuple(parts)] += n
        words = joined


def test_text_survives_encoding(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(chr(c) for c in (rng.randrange(rng.choice([128, 0x800, 0x110000])) for _ in range(rng.randint(0, 40)))
                       if not 0xD800 <= c < 0xE000)  # fmt: skip
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.token_bytes()[ids]) == len(text.encode())


def test_the_fast_split_is_the_rule_of_the_library(tokenizer: Tokenizer, corpus: list[str]) -> None:
    rule = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    rng = random.Random(4)
    odd = ["中\U00031350x", "ⓐ\u1c80'ſ ſ's K\n a", "\u180e x\n\ny 中\n z", "\n\n  é\n  x\n"]  # with characters left to the library
    for text in [*corpus, *odd, *(random_text(rng, 60) for _ in range(500))]:
        words: list[str] = []
        for piece, split in split_words(text):
            words += piece if split else [w for w, _ in rule.pre_tokenize_str(piece[0])]
        assert words == [w for w, _ in rule.pre_tokenize_str(text)], ascii(text)
    assert any(not split for text in odd for _, split in split_words(text))


@pytest.mark.slow
def test_every_stand_in_has_the_class_that_the_library_sees() -> None:
    classes = {"A": r"\p{L}", "0": r"\p{N}", "\t": r"\s", "#": r"[^\s\p{L}\p{N}]"}
    found = {c: stand_in(c) for c in map(chr, range(128, 0x110000)) if not "\ud800" <= c < "\ue000"}
    assert sum(v is not None for v in found.values()) > 200_000
    for shape, rule in classes.items():
        members = "".join(c for c, v in found.items() if v == shape)
        assert len(members) > 10
        left = pre_tokenizers.Split(Regex(rule + "+"), "removed").pre_tokenize_str(members)
        assert left == [], (shape, [ascii(w) for w, _ in left][:5])


def test_special_tokens_come_last_and_never_from_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert [tokenizer.special_id(t) for t in SPECIAL_TOKENS] == list(range(512 - 9, 512))
    assert tokenizer.bos_id == 503 and tokenizer.vocab_size == 512
    assert tokenizer.decode([tokenizer.bos_id, 65]) == "<|bos|>A"
    tokenizer.save(tmp_path)
    for t in (tokenizer, Tokenizer.load(tmp_path)):
        for text in ("<|bos|>", "a<|user_start|>b", "é<|assistant_end|>", "中\U00031350<|bos|>"):
            ids = t.encode(text)
            assert max(ids) < 503 and t.decode(ids) == text
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.dtype == np.int32 and token_bytes.shape == (512,)
    assert token_bytes[:256].tolist() == [1] * 256 and (token_bytes[256:503] > 1).all() and not token_bytes[503:].any()
    with pytest.raises(ConfigError, match=r"'<\|eos\|>' is no special token; known: <\|bos\|>"):
        tokenizer.special_id("<|eos|>")


def test_bytes_keep_their_own_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert tokenizer.decode([0xC3]) == "�" and tokenizer.decode([0xC3, 0xA9]) == "é"


@pytest.mark.parametrize(
    ("change", "cause"), [({"schema_version": 0}, "schema 0, this version reads"), ({"trained_on": None}, "lacks trained_on")]
)
def test_metadata_of_another_version_is_named_as_the_cause(tokenizer: Tokenizer, tmp_path: Path, change: dict, cause: str) -> None:
    tokenizer.save(tmp_path)
    meta = json.loads((tmp_path / META_FILE).read_text()) | change
    (tmp_path / META_FILE).write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
    with pytest.raises(ConfigError, match=cause):
        Tokenizer.load(tmp_path)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash and loaded.trained_on == tokenizer.trained_on
    assert loaded.encode_batch(corpus) == tokenizer.encode_batch(corpus) == [tokenizer.encode(t) for t in corpus]
    assert tokenizer.trained_on["num_docs"] == len(corpus)


def test_training_is_repeatable_and_the_hash_names_the_content(tokenizer: Tokenizer, corpus: list[str]) -> None:
    assert Tokenizer.train(iter(corpus), 512).hash == tokenizer.hash
    assert Tokenizer.train(corpus, 511).hash != tokenizer.hash


def test_the_word_cache_is_emptied_and_ids_stay(tokenizer: Tokenizer, corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokenizer.encode_batch(corpus)
    monkeypatch.setattr("nanochat_model.tokenizer._MAX_CACHED_WORDS", 50)
    assert tokenizer.encode_batch(corpus) == expected
    assert len(tokenizer._words) < 2000


def test_threads_share_the_word_cache(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server encodes prompts in one thread and results of calls in another; here the second comes while the first is filling
    the cache."""
    shared = Tokenizer(tokenizer._vocab, tokenizer._merges)  # type: ignore[arg-type]
    one, two = "one two three", "9 88 7"
    found: list[list[int]] = []
    second = threading.Thread(target=lambda: found.append(shared.encode(two)))
    append = shared._word_starts.append

    def meanwhile(values: np.ndarray) -> None:
        if threading.current_thread() is not second:
            second.start()
            second.join(0.2)  # it has to wait for us
        append(values)

    monkeypatch.setattr(shared._word_starts, "append", meanwhile)
    found.append(shared.encode(one))
    second.join()
    monkeypatch.undo()
    assert sorted(found) == sorted(tokenizer.encode_batch([one, two]))
    assert shared.encode_batch([one, two]) == tokenizer.encode_batch([one, two])


def test_a_vocabulary_larger_than_the_corpus_says_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 500 is larger than the corpus supports: it has (\d+) merges") as caught:
        Tokenizer.train(["abab abab xyz"], 500)
    possible = int(re.search(r"at most (\d+) or more text", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert Tokenizer.train(["abab abab xyz"], possible).vocab_size == possible
    with pytest.raises(ConfigError, match=f"at most {possible}"):
        Tokenizer.train(["abab abab xyz"], possible + 1)
    with pytest.raises(ConfigError, match="it has 0 merges of pairs seen at least twice"):
        Tokenizer.train(["abcdefg"], 266)
    with pytest.raises(ConfigError, match="vocab_size 100 is under 265"):
        Tokenizer.train(["abc"], 100)


def test_broken_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nowhere")
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text(encoding="utf8")
    file.write_text(whole[: len(whole) // 2], encoding="utf8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    data = json.loads(whole)
    data["model"]["merges"] = data["model"]["merges"][:-1]
    file.write_text(json.dumps(data), encoding="utf8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: content [0-9a-f]{16}, but tokenizer_meta\.json names"):
        Tokenizer.load(tmp_path)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no byte-level BPE vocabulary"):
        Tokenizer.load(tmp_path)


class Encoding:
    """As tiktoken pickles one: a plain object with this state."""

    __module__ = "tiktoken.core"
    __qualname__ = "Encoding"

    def __init__(self, state: object) -> None:
        self.state = state

    def __getstate__(self) -> object:
        return self.state


def pickled(value: object, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Pickle by reference to tiktoken.core, which need not be installed."""
    module = types.ModuleType("tiktoken.core")
    module.Encoding = Encoding  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiktoken", types.ModuleType("tiktoken"))
    monkeypatch.setitem(sys.modules, "tiktoken.core", module)
    return pickle.dumps(value)


def test_nanochats_pickle_is_read_and_nothing_in_it_executed(
    tokenizer: Tokenizer, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {tokenizer.decode_bytes([i]): i for i in range(503)}
    state = {
        "name": "rustbpe", "pat_str": SPLIT_PATTERN, "mergeable_ranks": ranks,
        "special_tokens": {t: 503 + i for i, t in enumerate(SPECIAL_TOKENS)},
    }  # fmt: skip
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickled(Encoding(state), monkeypatch))
    assert import_nanochat_tokenizer(tmp_path).encode_batch(corpus) == tokenizer.encode_batch(corpus)

    monkeypatch.setattr(Encoding, "__setstate__", lambda self, given: self.__init__(given), raising=False)
    made = pickle.loads(nanochat_pickle(tokenizer))  # as nanochat reads it
    assert type(made) is Encoding and {**made.state, "name": "rustbpe"} == state

    path.write_bytes(pickled(Encoding({**state, "pat_str": r"\w+"}), monkeypatch))
    with pytest.raises(ConfigError, match="split rule"):
        import_nanochat_tokenizer(path)
    path.write_bytes(pickled(Encoding({**state, "special_tokens": {"<|bos|>": 0}}), monkeypatch))
    with pytest.raises(ConfigError, match=r"special token '<\|bos\|>' has id 0, expected 503"):
        import_nanochat_tokenizer(path)
    path.write_bytes(pickled({"a": 1}, monkeypatch))
    with pytest.raises(ConfigError, match="not a pickled tiktoken Encoding"):
        import_nanochat_tokenizer(path)
    path.write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="not a pickled tiktoken Encoding"):
        import_nanochat_tokenizer(path)
    witness = tmp_path / "executed"
    path.write_bytes(b"cpathlib\nPath.touch\n(cpathlib\nPath\n(V" + str(witness).encode() + b"\ntRtR.")
    with pytest.raises(ConfigError, match=r"names pathlib\.Path.*, which is not executed"):
        import_nanochat_tokenizer(path)
    assert not witness.exists()


def test_ranks_must_be_whole() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    with pytest.raises(ConfigError, match="is not the merge of two tokens"):
        from_ranks({**ranks, b"abcd": 256})
    with pytest.raises(ConfigError, match="without gaps"):
        from_ranks({**ranks, b"ab": 300})
