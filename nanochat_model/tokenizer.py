"""Byte-level BPE: Hugging Face `tokenizers` underneath, plain JSON on disk, a cache of words in front.

Ids: 0..255 are the bytes themselves, then the merges in order of rank, then the special tokens.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash, write_atomic
from nanochat_model.spans import spans_index
from nanochat_model.word_split import SPLIT_PATTERN, split_words

BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS, "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip
TOKENIZER_FILE = "tokenizer.json"
META_FILE = "tokenizer_meta.json"
SCHEMA_VERSION = 1
_MAX_CACHED_WORDS = 1 << 20
_MAX_CACHED_IDS = 1 << 24
_NUM_BYTES = 256
SMALLEST_VOCAB = _NUM_BYTES + len(SPECIAL_TOKENS)
# Of the word caches of all tokenizers: a server encodes prompts in one thread and a calculator's results in another. Not of the
# instance, which must pickle.
_CACHE_LOCK = threading.Lock()


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table, as `tokenizers` uses it)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(_NUM_BYTES) if b not in table):
        table[b] = chr(_NUM_BYTES + n)
    return [table[b] for b in range(_NUM_BYTES)]


_BYTE_CHARACTERS = byte_characters()
_CHARACTER_BYTES = {c: b for b, c in enumerate(_BYTE_CHARACTERS)}


class Tokenizer:
    """Encodes text to ids and back. `hash` names its content: vocabulary, merges, split rule and special tokens."""

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], trained_on: Mapping[str, Any] | None = None
    ) -> None:
        """`vocab` and `merges` in byte characters, without special tokens; ids must be 0..len(vocab)-1. `trained_on`: what the
        merges were learned from, for the record."""
        self.trained_on = dict(trained_on or {})
        self._vocab = vocab
        self._merges = [tuple(pair) for pair in merges]
        self._backend = HFTokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        self._backend.pre_tokenizer = _pre_tokenizer()
        self._backend.decoder = decoders.ByteLevel()
        self._backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
        self._backend.encode_special_tokens = True  # a special token's text in a document is ordinary text
        self._special_ids = {t: len(vocab) + i for i, t in enumerate(SPECIAL_TOKENS)}
        ordered = sorted(vocab, key=vocab.__getitem__)
        self._bytes = [bytes(_CHARACTER_BYTES[c] for c in token) for token in ordered]
        self._bytes += [t.encode() for t in SPECIAL_TOKENS]
        self._words: dict[str, int] = {}  # word -> its number in the cache
        self._word_ids = _Growing(np.int32)  # ids of all cached words, one after another
        self._word_starts = _Growing(np.int64)  # where each cached word's ids begin
        self._word_lengths = _Growing(np.int64)
        self.hash = content_hash([SPLIT_PATTERN, SPECIAL_TOKENS, ordered, self._merges])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, corpus_hash: str = "") -> Tokenizer:
        """Learn merges from `texts` until there are `vocab_size` ids, special tokens included.

        Raises ConfigError when the texts do not hold that many pairs seen at least twice, saying how many they support.
        """
        check_vocab_size(vocab_size)
        trained = HFTokenizer(models.BPE())
        trained.pre_tokenizer = _pre_tokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=2,  # a pair seen once says nothing about other text
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained_on: dict[str, Any] = {"corpus_hash": corpus_hash, "num_docs": 0, "num_bytes": 0}

        def counted() -> Iterator[str]:
            for text in texts:
                trained_on["num_docs"] += 1
                trained_on["num_bytes"] += len(text.encode())
                yield text

        trained.train_from_iterator(counted(), trainer)
        merges = [(a, b) for a, b in json.loads(trained.to_str())["model"]["merges"]]
        vocab = {c: b for b, c in enumerate(_BYTE_CHARACTERS)}
        for a, b in merges:
            vocab.setdefault(a + b, len(vocab))
        supported = len(vocab) + len(SPECIAL_TOKENS)
        if supported < vocab_size:
            raise ConfigError(
                f"vocab_size {vocab_size} is larger than the corpus supports: it has {supported - SMALLEST_VOCAB} merges of pairs "
                f"seen at least twice; give a vocab_size of at most {supported} or more text"
            )
        return cls(vocab, merges, trained_on)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int:
        return self._special_ids[BOS]

    def special_id(self, token: str) -> int:
        """Id of a special token such as '<|user_start|>'. Raises ConfigError on any other text."""
        if token not in self._special_ids:
            raise ConfigError(f"{token!r} is no special token; known: {', '.join(SPECIAL_TOKENS)}")
        return self._special_ids[token]

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 (V,); 0 for special tokens, which bits per byte do not count."""
        lengths = [len(b) for b in self._bytes[: len(self._vocab)]]
        return np.array(lengths + [0] * len(SPECIAL_TOKENS), np.int32)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never special ones, and no BOS is added."""
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as int32 (n,): the same as `encode`, faster for long texts."""
        pieces = [self._ids_of_words(words) if split else self._ids_of_text(words[0]) for words, split in split_words(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens by name; bytes that are no valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        assert not ids or min(ids) >= 0, f"id {min(ids)} stands for no token"
        return b"".join([self._bytes[i] for i in ids])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (also readable by Hugging Face `tokenizers`) and tokenizer_meta.json into `folder`."""
        folder = Path(folder)
        write_atomic(folder / TOKENIZER_FILE, self._backend.to_str(pretty=True))
        meta = {
            "schema_version": SCHEMA_VERSION,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "num_merges": len(self._merges),
            "special_tokens": self._special_ids,
            "split_pattern": SPLIT_PATTERN,
            "trained_on": self.trained_on,
        }
        write_atomic(folder / META_FILE, json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises ConfigError when it is missing, broken or of another content than its meta says."""
        folder = Path(folder)
        meta = _read_json(folder / META_FILE)
        data = _read_json(folder / TOKENIZER_FILE)
        if meta.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"{folder / META_FILE}: schema {meta.get('schema_version')!r}, this version reads {SCHEMA_VERSION}; train the "
                "tokenizer again, or use the release that made it"
            )
        missing = sorted({"hash", "trained_on"} - meta.keys())
        if missing:
            raise ConfigError(
                f"{folder / META_FILE}: lacks {', '.join(missing)}, so another version made it; train the tokenizer again, or use "
                "the release that made it"
            )
        try:
            tokenizer = cls(data["model"]["vocab"], [(a, b) for a, b in data["model"]["merges"]], meta["trained_on"])
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(
                f"{folder / TOKENIZER_FILE}: no byte-level BPE vocabulary ({e!r}); train the tokenizer again"
            ) from None
        if tokenizer.hash != meta.get("hash"):
            raise ConfigError(
                f"{folder / TOKENIZER_FILE}: content {tokenizer.hash}, but {META_FILE} names {meta.get('hash')}; train it again"
            )
        return tokenizer

    def _ids_of_text(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def _ids_of_words(self, words: list[str]) -> np.ndarray:
        """Ids of `words` in a row, through the cache."""
        with _CACHE_LOCK:
            numbers = self._words
            if len(numbers) > _MAX_CACHED_WORDS or len(self._word_ids) > _MAX_CACHED_IDS:
                for cache in (numbers, self._word_ids, self._word_starts, self._word_lengths):
                    cache.clear()
            new = [w for w in dict.fromkeys(words) if w not in numbers]
            if new:
                encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
                numbers.update(zip(new, range(len(numbers), len(numbers) + len(new)), strict=True))
                lengths = np.fromiter(map(len, encodings), np.int64, len(new))
                self._word_starts.append(len(self._word_ids) + np.cumsum(lengths) - lengths)
                self._word_lengths.append(lengths)
                ids = itertools.chain.from_iterable(e.ids for e in encodings)
                self._word_ids.append(np.fromiter(ids, np.int32, lengths.sum()))
            which = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
            return self._word_ids.values[spans_index(self._word_starts.values[which], self._word_lengths.values[which])]


class _Growing:
    """A one-dimensional array that grows at the end by doubling."""

    def __init__(self, dtype: type) -> None:
        self._buffer: np.ndarray = np.empty(1024, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> np.ndarray:
        return self._buffer[: self._length]

    def append(self, values: np.ndarray) -> None:
        end = self._length + len(values)
        if end > len(self._buffer):
            self._buffer = np.concatenate([self.values, np.empty(max(end, len(self._buffer)), self._buffer.dtype)])
        self._buffer[self._length : end] = values
        self._length = end

    def clear(self) -> None:
        self._length = 0


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(f"no tokenizer at {path}; train one first or give its folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not valid JSON (cut short?); train the tokenizer again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, not an object; train the tokenizer again")
    return value


def check_vocab_size(vocab_size: int) -> None:
    """ConfigError for a vocabulary that would not even hold the bytes and the special tokens."""
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"vocab_size {vocab_size} is under {SMALLEST_VOCAB}, the {_NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"give at least {SMALLEST_VOCAB}"
        )
