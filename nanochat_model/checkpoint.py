"""Checkpoints: atomic, checksummed folders of safetensors and JSON.

    <run>/checkpoints/step_000123/
        model.safetensors                     weights under nanochat's names, in the precision they are trained in
        optimizer.safetensors, optimizer.json  world-size independent optimizer state (absent: inference only)
        state.json                            step, configs, RNG, parents, curve so far, seconds
        checksums.json                        bytes and SHA-256 of each of the above

A folder is filled under a hidden name, flushed to disk and then renamed, so a crash leaves no half checkpoint under a final
name. A torn or corrupt one (power loss, full disk, bit rot) is found by its checksums, named, and the one before it is used.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from nanochat_model import tensor_tree
from nanochat_model.artifacts import sha256_file
from nanochat_model.config import GPTConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import HASH_LEN, from_dict
from nanochat_model.record import CurvePoint

if TYPE_CHECKING:
    from nanochat_model.gpt import GPT

FORMAT = 1
CHECKPOINTS_DIR = "checkpoints"
TOKENIZER_DIR = "tokenizer"
TOKENIZER_FILE, META_FILE = "tokenizer.json", "tokenizer_meta.json"  # as tokenizer.py writes them
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
CHECKSUMS_FILE = "checksums.json"
_STEP_NAME = re.compile(r"step_(\d{6,})$")
_log = logging.getLogger(__name__)


class CheckpointError(ConfigError):
    """A checkpoint is missing, torn, corrupt, or does not fit."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """state.json: all of a checkpoint that is not a tensor."""

    format: int = FORMAT
    kind: Literal["base", "sft", "imported"] = "base"
    step: int  # steps done; also the loader's position, which is a pure function of it
    model: GPTConfig
    config: TrainConfig | None = None
    run_id: str = ""
    parents: dict[str, str] = field(default_factory=dict)  # name of the artifact -> content hash
    rng: dict[str, str] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    seconds: float = 0.0  # of training so far
    loop: dict[str, Any] = field(default_factory=dict)  # smoothed loss, loss scale, skipped steps …
    extra: dict[str, Any] = field(default_factory=dict)  # of other kinds: SFT's config, an import's origin


def step_dir(root: str | os.PathLike[str], step: int) -> Path:
    """Folder of `step`'s checkpoint under a run's checkpoints folder."""
    return Path(root) / f"step_{step:06d}"


def save_checkpoint(
    root: str | os.PathLike[str],
    state: CheckpointState,
    model_state: Mapping[str, torch.Tensor],
    optimizer_state: Any = None,
    *,
    keep_last: int = 0,
    keep_steps: Collection[int] = (),
) -> Path:
    """Write a checkpoint of `state.step` under `root` and return its folder. Call on rank 0 only.

    `optimizer_state`: nested plain data with tensors, or None. `keep_last` > 0 removes older ones beyond that number, except
    those of `keep_steps`. An existing checkpoint of the same step is replaced.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    final = step_dir(root, state.step)
    partial = root / f".partial-{final.name}-{os.getpid()}"
    for stale in root.glob(".partial-*"):  # of a killed process; a run folder has one writer
        shutil.rmtree(stale)
    partial.mkdir()
    try:
        tensor_tree.save_tensors(partial / MODEL_FILE, dict(model_state))
        if optimizer_state is not None:
            tensor_tree.save_tree(partial / "optimizer", optimizer_state)
        (partial / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state), indent=1), encoding="utf8")
        sums = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in sorted(partial.iterdir())}
        (partial / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=1), encoding="utf8")
        for file in partial.iterdir():
            _fsync(file)
        _fsync(partial)
        if final.exists():
            os.replace(final, root / f".partial-old-{final.name}")
        os.replace(partial, final)
        _fsync(root)
    finally:
        for leftover in root.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    if keep_last:
        _prune(root, keep_last, keep_steps)
    return final


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prune(root: Path, keep_last: int, keep_steps: Collection[int]) -> None:
    for path in list(all_checkpoints(root))[keep_last:]:
        if step_of(path) not in keep_steps:
            shutil.rmtree(path)


def step_of(path: Path) -> int:
    match = _STEP_NAME.search(path.name)
    assert match, path
    return int(match.group(1))


def all_checkpoints(root: str | os.PathLike[str]) -> Iterator[Path]:
    """Checkpoint folders under `root`, newest first, unverified."""
    root = Path(root)
    found = [p for p in root.iterdir() if p.is_dir() and _STEP_NAME.match(p.name)] if root.is_dir() else []
    return iter(sorted(found, key=step_of, reverse=True))


def verify(path: str | os.PathLike[str]) -> None:
    """Compare every file of a checkpoint with its checksum. Raises CheckpointError naming the file and what is wrong."""
    path = Path(path)
    sums_file = path / CHECKSUMS_FILE
    if not sums_file.is_file():
        raise CheckpointError(f"{path}: {CHECKSUMS_FILE} is missing, so it was never finished; use an older checkpoint")
    try:
        sums = json.loads(sums_file.read_text(encoding="utf8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in sums.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{sums_file}: not readable (cut short?); use an older checkpoint") from None
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; use an older checkpoint")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {size} (cut short); use an older checkpoint")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{file}: checksum differs, so its content is corrupt; use an older checkpoint")
    for name in (MODEL_FILE, STATE_FILE):
        if name not in expected:
            raise CheckpointError(f"{path}: {CHECKSUMS_FILE} does not list {name}; use an older checkpoint")


def find_latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest intact checkpoint under `root`, or None. Each damaged one that is passed over is named in a warning."""
    for path in all_checkpoints(root):
        try:
            verify(path)
        except CheckpointError as e:
            _log.warning("checkpoint skipped: %s", e)
            continue
        return path
    return None


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by `path`: a checkpoint itself, or the newest intact one of a run or checkpoints folder.

    Raises CheckpointError when there is none, or when the given checkpoint is damaged.
    """
    path = Path(path)
    if (path / CHECKSUMS_FILE).is_file() or (path / MODEL_FILE).is_file():
        verify(path)
        return path
    for root in (path, path / CHECKPOINTS_DIR):
        if any(all_checkpoints(root)):
            found = find_latest(root)
            if found is None:
                raise CheckpointError(f"{root}: every checkpoint in it is damaged; train again, or restore one from a copy")
            return found
    if any(path.glob("model_*.pt")):
        raise CheckpointError(f"{path} is a nanochat checkpoint; convert it first: nanoladder import-nanochat {path} --out FOLDER")
    raise CheckpointError(f"no checkpoint at {path}; give a checkpoint (step_000123), a run folder or its {CHECKPOINTS_DIR} folder")


def checkpoint_hash(path: str | os.PathLike[str]) -> str:
    """Content hash of a checkpoint, for the parents of what is made from it: of its list of checksums."""
    return hashlib.sha256((Path(path) / CHECKSUMS_FILE).read_bytes()).hexdigest()[:HASH_LEN]


def read_state(path: str | os.PathLike[str]) -> CheckpointState:
    """state.json of one checkpoint folder. Raises CheckpointError if it is missing, broken or of another format."""
    file = Path(path) / STATE_FILE
    try:
        data = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: not readable ({e}); use another checkpoint") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{file}: checkpoint format {found!r}, this version reads {FORMAT}; use the release that wrote it")
    return from_dict(CheckpointState, data, f"{file}: ")


def read_model_state(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Weights by name, on the CPU."""
    return tensor_tree.load_tensors(Path(path) / MODEL_FILE)


def read_optimizer_state(path: str | os.PathLike[str]) -> Any | None:
    """Consolidated optimizer state, or None for a checkpoint without one."""
    stem = Path(path) / "optimizer"
    return tensor_tree.load_tree(stem) if stem.with_suffix(".json").is_file() else None


def load_model(path: str | os.PathLike[str], device: str = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """Model of a checkpoint (see `resolve` for what `path` may be), in evaluation mode on `device`.

    `dtype` is the compute dtype (default float32). Called on ids of shape (B, T) it returns float32 logits (B, T, V).
    Raises CheckpointError on a missing or damaged checkpoint, ConfigError on a device that is not there.
    """
    from nanochat_model.device import choose_device
    from nanochat_model.gpt import GPT

    path, place = resolve(path), choose_device(str(device))
    model = GPT(read_state(path).model, compute_dtype=dtype or torch.float32)
    load_weights(model, path)
    return model.to(place).eval()


def copy_tokenizer(source: Path, run_dir: Path) -> None:
    """Put the tokenizer that lies in `source` into the run's folder once, so that a run can be moved and talked to."""
    target = run_dir / TOKENIZER_DIR
    if not target.is_dir() and (source / TOKENIZER_FILE).is_file():
        partial = run_dir / f".{TOKENIZER_DIR}-{os.getpid()}"
        partial.mkdir(parents=True, exist_ok=True)
        for name in (TOKENIZER_FILE, META_FILE):
            shutil.copyfile(source / name, partial / name)
        os.replace(partial, target)


def tokenizer_dir(path: str | os.PathLike[str]) -> Path:
    """Folder of the tokenizer that belongs to a checkpoint: in it, in its run's folder, or beside the shards it was trained on.

    `path` is what `resolve` takes. Raises CheckpointError when none of them has one.
    """
    found = find_tokenizer_dir(path)
    if found is None:
        raise CheckpointError(
            f"{resolve(path)}: no tokenizer in it, in its run or in its shards; copy tokenizer.json and its meta file beside it"
        )
    return found


def find_tokenizer_dir(path: str | os.PathLike[str]) -> Path | None:
    """As `tokenizer_dir`, or None where there is no tokenizer (an imported model may come without)."""
    path = resolve(path)
    config = read_state(path).config
    folders = [f / name for f in (path, path.parent, path.parent.parent) for name in (TOKENIZER_DIR, ".")]
    folders += [Path(config.data.path)] if config is not None and config.data.path else []
    for folder in folders:
        if (folder / TOKENIZER_FILE).is_file():
            return folder
    return None


def load_weights(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint's weights into `model`. Raises CheckpointError naming the first weight that does not fit."""
    weights, own = read_model_state(path), model.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own or weights[name].shape != own[name].shape:
            have = tuple(weights[name].shape) if name in weights else "missing"
            want = tuple(own[name].shape) if name in own else "no such weight"
            raise CheckpointError(f"{path}: {name} is {have} in the checkpoint and {want} in the model; load it as its own config")
    model.load_state_dict(weights)


def capture_rng() -> dict[str, str]:
    """State of the random generators, as text. (Training itself draws no random numbers: there is no dropout, and the loader
    is a pure function of the step. Callbacks may.)"""
    state = {"torch_cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(), "python": repr(random.getstate())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["torch_cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def restore_rng(state: Mapping[str, str]) -> None:
    """Inverse of `capture_rng`; generators that the checkpoint does not hold keep their state."""
    import ast

    if "torch_cpu" in state:
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch_cpu"])), dtype=torch.uint8))
    if "python" in state:
        random.setstate(ast.literal_eval(state["python"]))
    if "torch_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch_cuda"])), dtype=torch.uint8))
