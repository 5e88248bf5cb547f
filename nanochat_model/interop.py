"""nanochat's checkpoints: read into this project's layout, and written back.

A nanochat checkpoint is `model_{step:06d}.pt` (a state dict) beside `meta_{step:06d}.json`. Tensors are read without executing
anything pickled. Weights are stored here in float32: nanochat's bf16 tables convert exactly. Its optimizer shards
(`optim_*_rank*.pt`) are tied to a world size and are left out, as an imported model is for evaluation, SFT and chat.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_model.checkpoint import (
    TOKENIZER_DIR,
    CheckpointState,
    find_tokenizer_dir,
    read_model_state,
    read_state,
    resolve,
    save_checkpoint,
)
from nanochat_model.config import VE_GATE_CHANNELS, GPTConfig, OptimizerConfig, TrainConfig
from nanochat_model.counts import count_params
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.identity import write_atomic
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.tokenizer_import import import_nanochat_tokenizer, nanochat_pickle

PREFIX = "_orig_mod."  # torch.compile puts it before every name
_MODEL_FILE = re.compile(r"model_(\d+)\.pt$")
DEFAULT_SFT_ROWS = 32  # of a fine-tuning's batch where the pretraining's is not known
NO_TOKENIZER = "none"
OLD_CONFIG_DEFAULTS = {"window_pattern": "L"}  # before windows every layer saw the whole row (nanochat checkpoint_manager.py)
SINCE_MARCH = ("smear_gate.weight", "smear_lambda", "backout_lambda")
KEPT_META = ("step", "val_bpb", "user_config", "model_config", "total_batch_size")  # of the meta file: what fine-tuning inherits
TOKENIZER_PICKLE = Path("tokenizer") / "tokenizer.pkl"
BF16_TABLES = ("transformer.wte.", "value_embeds.")  # stored so by nanochat where it computes in bf16


@dataclass(frozen=True)
class NanochatCheckpoint:
    """What was found in a nanochat folder."""

    path: Path
    step: int
    config: GPTConfig
    weights: dict[str, Tensor]
    meta: dict[str, Any]
    filled: tuple[str, ...]  # parameters an older checkpoint lacks, given the value that leaves them without effect


def import_nanochat(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    step: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Convert the checkpoint in folder `src` (its last step unless given) into a checkpoint under `out`; returns its folder.

    `src` may also be one model_<step>.pt. `tokenizer`: nanochat's tokenizer.pkl or its folder, converted beside the checkpoint
    (nothing in it is executed), or "none". Not given, it is looked for in `src` (where export_nanochat puts it) and where nanochat
    keeps it, two folders above; without one the weights alone are imported.
    Raises ConfigError if a file is missing, broken, of another architecture, or holds anything but tensors.
    """
    found = read_nanochat(src, step)
    pickled = _find_tokenizer(found.path.parent, tokenizer)
    converted = None if pickled is None else import_nanochat_tokenizer(pickled)
    if converted is not None and converted.vocab_size != found.config.vocab_size:
        raise ConfigError(
            f"tokenizer {pickled} has {converted.vocab_size} ids, the model {found.config.vocab_size}; "
            f"give the one the model was trained with, or {NO_TOKENIZER!r}"
        )
    extra = {
        "source": "nanochat",
        "source_path": str(found.path),
        "source_meta": {k: found.meta[k] for k in KEPT_META if k in found.meta},
        "tokenizer_path": "" if pickled is None else str(pickled),
        "filled": list(found.filled),
    }
    state = CheckpointState(kind="imported", step=found.step, model=found.config, extra=extra)
    if converted is not None:
        converted.save(Path(out) / TOKENIZER_DIR)
    return save_checkpoint(out, state, found.weights)


def inherited_config(state: CheckpointState) -> TrainConfig:
    """What a fine-tuning of an imported model takes over, as nanochat's chat_sft does: the learning rates that its pretraining was
    given (before they were scaled to the batch) and its batch; nanochat's defaults where the meta file does not tell."""
    meta = state.extra.get("source_meta", {})
    given = meta.get("user_config") or {}
    names = ("embedding_lr", "unembedding_lr", "matrix_lr")
    rates: dict[str, Any] = {name: float(given[name]) for name in names if given.get(name)}
    length, batch = state.model.sequence_len, int(meta.get("total_batch_size") or 0)
    fits = batch > 0 and batch % length == 0
    return TrainConfig(
        model=state.model, optimizer=OptimizerConfig(**rates), batch_tokens=batch if fits else DEFAULT_SFT_ROWS * length
    )


def _find_tokenizer(folder: Path, given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None:
        return None if str(given) == NO_TOKENIZER else Path(given)
    standard = (folder / TOKENIZER_PICKLE, folder.resolve().parent.parent / TOKENIZER_PICKLE)
    return next((p for p in standard if p.is_file()), None)


def export_nanochat(src: str | os.PathLike[str], out: str | os.PathLike[str], *, bf16_tables: bool = False) -> Path:
    """Write the checkpoint `src` (or a run's newest) as nanochat's files in folder `out`; returns the model file.

    `bf16_tables` stores the embedding tables as nanochat itself does where it computes in bf16; otherwise all is float32. The
    tokenizer, where the checkpoint has one, is written into `out`/tokenizer: nanochat reads it from its base folder's `tokenizer`,
    which is not touched here, as other models of nanochat's may need theirs.
    """
    source = resolve(src)
    state, weights = read_state(source), read_model_state(source)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if bf16_tables:
        weights = {n: w.bfloat16() if n.startswith(BF16_TABLES) else w for n, w in weights.items()}
    path = out / f"model_{state.step:06d}.pt"
    _write(path, lambda temporary: torch.save(weights, temporary))
    original = state.extra.get("source_meta", {})
    meta = {
        "step": state.step,
        "val_bpb": state.curve[-1].val_bpb if state.curve else original.get("val_bpb"),
        "model_config": config_to_nanochat(state.model),
        "user_config": original.get("user_config", {}),
    }
    write_atomic(out / f"meta_{state.step:06d}.json", json.dumps(meta, indent=2))
    tokenizer = find_tokenizer_dir(source)
    if tokenizer is not None:
        _write_tokenizer(Tokenizer.load(tokenizer), out / TOKENIZER_PICKLE)
    return path


def _write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """tokenizer.pkl, and beside it the bytes of each token, from which nanochat computes bits per byte (int32, V)."""
    path.parent.mkdir(exist_ok=True)
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    _write(path, lambda temporary: temporary.write_bytes(nanochat_pickle(tokenizer)))
    _write(path.with_name("token_bytes.pt"), lambda temporary: torch.save(token_bytes, temporary))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """A binary file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


def read_nanochat(src: str | os.PathLike[str], step: int | None = None) -> NanochatCheckpoint:
    """Read and check a nanochat checkpoint folder (or one model file of it). Raises ConfigError as `import_nanochat`."""
    folder, step = _choose_step(Path(src), step)
    path, meta_path = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    meta = _read_meta(meta_path)
    config = config_from_nanochat(meta["model_config"], str(meta_path))
    weights = {name.removeprefix(PREFIX): w for name, w in _read_tensors(path).items()}
    _refuse_older(weights, path)
    filled = _fill_missing(weights, config)
    _check_shapes(weights, config, path)
    weights = {name: w.float().contiguous() for name, w in weights.items()}
    return NanochatCheckpoint(path, step, config, weights, meta, filled)


def _choose_step(src: Path, step: int | None) -> tuple[Path, int]:
    """The folder of the checkpoint meant by `src`, and which of its steps."""
    named = _MODEL_FILE.match(src.name)
    folder = src.parent if named else src
    steps = sorted(int(m.group(1)) for f in folder.glob("model_*.pt") if (m := _MODEL_FILE.match(f.name)))
    if not steps:
        raise ConfigError(_nothing_there(folder))
    step = int(named.group(1)) if named and step is None else step
    if step is not None and step not in steps:
        raise ConfigError(f"no checkpoint of step {step} in {folder}; it has {', '.join(map(str, steps))}")
    return folder, steps[-1] if step is None else step


def _nothing_there(folder: Path) -> str:
    """Why `folder` is not a checkpoint's, with the folders in it that are."""
    if not folder.is_dir():
        return f"{folder} is no folder; give one such as base_checkpoints/d24 of a nanochat run, with its model_<step>.pt"
    inside = sorted({f.parent for depth in ("*", "*/*") for f in folder.glob(f"{depth}/model_*.pt")})
    remedy = f"give one of {', '.join(map(str, inside))}" if inside else "give one such as base_checkpoints/d24 of a nanochat run"
    return f"no model_<step>.pt in {folder}; {remedy}"


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing; copy it from the nanochat run, it holds the model's shape, or give the step of another checkpoint"
        ) from None
    except ValueError as e:
        raise ConfigError(f"{path}: not valid JSON ({e}); copy it again from the nanochat run") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise ConfigError(f"{path}: has no model_config; it is not the meta file of a nanochat checkpoint")
    return meta


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{path}: holds pickled objects other than tensors, which are not executed; save a plain state dict"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        raise ConfigError(f"{path}: not readable ({str(e).splitlines()[0]}); copy it again from the nanochat run") from None
    if not isinstance(data, dict) or not all(isinstance(w, Tensor) for w in data.values()):
        raise ConfigError(f"{path}: not a state dict of tensors")
    return data


def config_from_nanochat(found: dict[str, Any], where: str = "model_config") -> GPTConfig:
    """GPTConfig of nanochat's model_config. Raises ConfigError on a missing or unknown key."""
    values = {**OLD_CONFIG_DEFAULTS, **found}
    names = {
        "n_layer": "depth",
        "n_embd": "model_dim",
        "n_head": "num_heads",
        "n_kv_head": "num_kv_heads",
        "sequence_len": "sequence_len",
        "vocab_size": "vocab_size",
        "window_pattern": "window_pattern",
    }
    missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has the unknown key {unknown[0]}"
        raise ConfigError(f"{where}: model_config {what}; this version reads {', '.join(names)}")
    config = {ours: values[theirs] for theirs, ours in names.items()}
    return GPTConfig(**{**config, "window_pattern": str(config["window_pattern"]).upper()})


def config_to_nanochat(config: GPTConfig) -> dict[str, Any]:
    """nanochat's model_config of a GPTConfig."""
    return {
        "sequence_len": config.sequence_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.depth,
        "n_head": config.num_heads,
        "n_kv_head": config.num_kv_heads,
        "n_embd": config.model_dim,
        "window_pattern": config.window_pattern,
    }


def _refuse_older(weights: dict[str, Tensor], path: Path) -> None:
    """Raise ConfigError for a model of an earlier nanochat. Its weights might fit, but what they meant has changed since, without a
    trace in the files: the softcap, the rotary base, the range of gates, the scale of queries and keys, the short window (nanochat
    gpt.py at 6ed7d1d, 2026-03-09, and a825e63, 2026-03-14). Logits computed by today's constants would be wrong."""
    gates = {w.shape[-1] for n, w in weights.items() if n.endswith("ve_gate.weight") and w.dim() == 2}
    if gates - {VE_GATE_CHANNELS}:
        found = f"has value-embedding gates of {max(gates)} channels, now {VE_GATE_CHANNELS}: it is from before 2026-03-09"
    elif missing := [name for name in SINCE_MARCH if name not in weights]:
        found = f"lacks {missing[0]}: it is from before 2026-03-14"
    else:
        return
    raise ConfigError(
        f"{path}: {found}, and nanochat has changed constants since that no file tells of; use the nanochat of its time"
    )


def _fill_missing(weights: dict[str, Tensor], config: GPTConfig) -> tuple[str, ...]:
    """Scalars that nanochat itself fills where they are missing, set so that they do nothing (checkpoint_manager.py)."""
    neutral = {"resid_lambdas": torch.ones(config.depth), "x0_lambdas": torch.zeros(config.depth)}
    missing = tuple(name for name in neutral if name not in weights)
    weights.update({name: neutral[name] for name in missing})
    return missing


def _check_shapes(weights: dict[str, Tensor], config: GPTConfig, path: Path) -> None:
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    for name in sorted(set(expected) | set(weights)):
        have = tuple(weights[name].shape) if name in weights else None
        want = expected.get(name)
        if have == want:
            continue
        if have is None:
            raise ConfigError(f"{path}: lacks {name}; it is of an older architecture that this version cannot compute")
        if want is None:
            raise ConfigError(f"{path}: has {name}, which this architecture does not know; it is of another nanochat version")
        raise ConfigError(
            f"{path}: {name} is {have}, its meta file's model_config says {want}; the two files do not belong together"
        )
    assert sum(w.numel() for w in weights.values()) == count_params(config).total
