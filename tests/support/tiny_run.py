"""A corpus, a tokenizer, shards and configs small enough that a training step takes milliseconds."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nanochat_model.config import EvalConfig, GPTConfig, OptimizerConfig, RuntimeConfig, ScheduleConfig, TrainConfig
from nanochat_model.corpus import build_corpus, iter_texts, open_corpus
from nanochat_model.overrides import apply_overrides
from nanochat_model.shard_set import ShardSet
from nanochat_model.shards import build_shards
from nanochat_model.tokenizer import Tokenizer

VOCAB_SIZE = 320
SEQUENCE_LEN = 32
RUNTIME = RuntimeConfig(device="cpu", num_threads=1, micro_batch_rows=4, log_every_steps=1, compile="off")

# For losses that agree however they are added up: at initialization every layer's output is parallel to the embedding, so the
# scalars' first gradients are rounding alone, and AdamW (eps 1e-10) makes full steps of the signs; losses then agree to 1e-3 only.
STILL = {"optimizer__scalar_lr": 1e-9, "optimizer__smear_lr": 1e-9}


def write_corpus(folder: Path, num_docs: int = 300) -> Path:
    """Documents of a small made-up language with structure to learn, as jsonl."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(60)]
    after = {w: rng.choices(words, k=3) for w in words}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "docs.jsonl").open("w", encoding="utf8") as f:
        for _ in range(num_docs):
            word, text = rng.choice(words), []
            for _ in range(rng.randint(30, 150)):
                text.append(word)
                word = rng.choice(after[word])
            f.write(json.dumps({"text": " ".join(text) + "."}) + "\n")
    return folder


@lru_cache
def tiny_shards() -> ShardSet:
    """Shards made once a process, removed when it ends."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="nanoladder-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    build_corpus(str(write_corpus(root / "text")), root / "corpus", val_fraction=0.1)
    tokenizer = Tokenizer.train(iter_texts(open_corpus(root / "corpus")), VOCAB_SIZE)
    return build_shards(root / "corpus", tokenizer, root / "shards")


def tiny_config(**overrides: Any) -> TrainConfig:
    """A two-layer model of 8 rows a step, in float32; dotted overrides replace fields."""
    config = TrainConfig(
        model=GPTConfig(
            depth=2, model_dim=32, num_heads=2, num_kv_heads=1, sequence_len=SEQUENCE_LEN, vocab_size=VOCAB_SIZE, window_pattern="L"
        ),
        optimizer=OptimizerConfig(weight_decay=0.05),
        schedule=ScheduleConfig(warmup_steps=3, momentum_warmup_steps=10),
        data=tiny_shards().data_config("keep_remainder"),
        eval=EvalConfig(num_tokens=2048, every_steps=0),
        batch_tokens=8 * SEQUENCE_LEN,
        num_steps=12,
        seed=1,
        compute_dtype="float32",
    )
    return apply_overrides(config, {k.replace("__", "."): v for k, v in overrides.items()})
