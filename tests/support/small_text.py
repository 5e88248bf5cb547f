"""Small corpora, tokenizers and shards for tests of the data."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from pathlib import Path
from typing import Any

from nanochat_model.corpus import build_corpus, iter_texts, open_corpus
from nanochat_model.shards import ShardSet, build_shards
from nanochat_model.tokenizer import Tokenizer

VOCAB_SIZE = 384


def texts(count: int = 120, seed: int = 0) -> list[str]:
    """Different documents of 20 to 3000 characters, cut from a module's source, some with characters beyond ASCII."""
    rng = random.Random(seed)
    source = inspect.getsource(json.decoder) + inspect.getsource(textwrap)
    found = []
    for i in range(count):
        start = rng.randrange(len(source) - 3000)
        length = rng.choice([20, 60, 200, 700, 3000])
        found.append(f"document {seed}.{i}{' – é中½' if i % 5 == 0 else ''}\n" + source[start : start + length])
    return found


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), encoding="utf8")
    return path


def small_corpus(folder: Path, count: int = 120, *, val_fraction: float = 0.2) -> Path:
    """A corpus folder of `count` documents."""
    source = write_jsonl(folder / "source.jsonl", texts(count))
    build_corpus(str(source), folder / "corpus", val_fraction=val_fraction)
    return folder / "corpus"


def small_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer trained on the corpus in `folder`/corpus."""
    return Tokenizer.train(iter_texts(open_corpus(folder / "corpus")), vocab_size)


def small_shards(folder: Path, count: int = 120, **options: Any) -> ShardSet:
    """Corpus, tokenizer and shards below `folder`; options as of build_shards."""
    corpus = small_corpus(folder, count)
    return build_shards(corpus, small_tokenizer(folder), folder / "shards", **options)
