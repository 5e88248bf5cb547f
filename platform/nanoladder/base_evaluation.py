"""What a base checkpoint reaches, measured from what lies on the disk: bits per byte, and CORE where its tasks are at hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat_model.errors import ConfigError


def evaluate_base(
    checkpoint: str | Path, *, num_tokens: int = 0, core_bundle: str = "", core_max_per_task: int = 0, device: str = "auto"
) -> dict[str, Any]:
    """{"checkpoint", "hash", "step", "val_bpb", "num_tokens", "core"}: on the shards, packing and number of validation tokens that
    it was trained with (`num_tokens` > 0 takes another number). `core` is None without a bundle. Raises ConfigError."""
    from nanochat_model.checkpoint import checkpoint_hash, load_model, read_state, resolve, tokenizer_dir
    from nanochat_model.core import evaluate_core
    from nanochat_model.device import choose_device
    from nanochat_model.evaluate import evaluate_bpb
    from nanochat_model.loader import Loader
    from nanochat_model.shard_set import ShardSet
    from nanochat_model.tokenizer import Tokenizer

    path = resolve(checkpoint)
    state = read_state(path)
    if state.config is None:
        raise ConfigError(f"{path} does not say what it was trained on; use nanoladder eval with --shards")
    model = load_model(path, device=str(choose_device(device)))
    shards, data = ShardSet.open(state.config.data.path), state.config.data
    loader = Loader(shards, split="val", packing=data.packing, sequence_len=model.config.sequence_len, rows_per_batch=1, seed=0)
    rows = loader.validation(num_tokens or state.config.eval.num_tokens)
    facts: dict[str, Any] = {
        "checkpoint": str(path),
        "hash": checkpoint_hash(path),
        "step": state.step,
        "val_bpb": evaluate_bpb(model.eval(), rows, shards.token_bytes),
        "num_tokens": int(rows[0].size),
        "core": None,
    }
    if core_bundle:
        tokenizer = Tokenizer.load(tokenizer_dir(path))
        facts["core"] = asdict(evaluate_core(model, tokenizer, core_bundle, max_per_task=core_max_per_task))
    return facts
