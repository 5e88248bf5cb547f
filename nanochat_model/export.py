"""A checkpoint as a folder that needs nothing of this package: safetensors, tokenizer.json, config.json and one Python file.

The Python file is modeling_nanoladder.py of this package, word for word, under a line that tells where it came from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanochat_model.checkpoint import MODEL_FILE, checkpoint_hash, read_model_state, read_state, resolve, tokenizer_dir
from nanochat_model.errors import ConfigError
from nanochat_model.identity import write_atomic
from nanochat_model.tokenizer import TOKENIZER_FILE, Tokenizer

CONFIG_FILE = "config.json"
MODELING_FILE = "modeling_nanoladder.py"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_standalone(src: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: str = "float32") -> Path:
    """Write the checkpoint `src` (or a run's newest) into folder `out` and return it.

    `dtype` bfloat16 halves the file and rounds the weights. Raises ConfigError for a missing or damaged checkpoint, one
    without its tokenizer, or an `out` that holds other things.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; choose {' or '.join(DTYPES)}")
    source, out = resolve(src), Path(out)
    state = read_state(source)
    tokenizer = Tokenizer.load(tokenizer_dir(source))
    if tokenizer.vocab_size != state.model.vocab_size:
        raise ConfigError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} ids, the model {state.model.vocab_size}; put its own beside it"
        )
    _check_folder(out)
    weights = {name: w.to(DTYPES[dtype]).contiguous() for name, w in read_model_state(source).items()}
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".{MODEL_FILE}.{os.getpid()}"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, out / MODEL_FILE)
    shutil.copyfile(tokenizer_dir(source) / TOKENIZER_FILE, out / TOKENIZER_FILE)
    facts: dict[str, Any] = {
        "model_type": "nanoladder",
        "architectures": ["NanoladderModel"],
        "torch_dtype": dtype,
        **dataclasses.asdict(state.model),
        "special_tokens": {name: tokenizer.special_id(f"<|{name}|>") for name in SPECIAL_NAMES},
        "source": {"kind": state.kind, "step": state.step, "run_id": state.run_id, "checkpoint": checkpoint_hash(source)},
    }
    write_atomic(out / CONFIG_FILE, json.dumps(facts, indent=1))
    write_atomic(out / MODELING_FILE, modeling_source())
    return out


SPECIAL_NAMES = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")


def modeling_source() -> str:
    """Text of the single file."""
    template = Path(__file__).with_name(MODELING_FILE).read_text(encoding="utf8")
    return f"# Written by nanoladder export beside the weights it belongs to. MIT license.\n{template}"


def _check_folder(out: Path) -> None:
    """Nothing of anybody else's is mixed with, or written over."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    ours = {MODEL_FILE, TOKENIZER_FILE, CONFIG_FILE, MODELING_FILE, "__pycache__"}
    others = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else []
    if others:
        raise ConfigError(f"{out} holds other files ({others[0]}); give an empty or new folder")
