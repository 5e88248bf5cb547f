"""Nested dicts and lists with tensors at the leaves, as one safetensors file plus JSON: no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat_model.errors import ConfigError

TENSOR_KEY = "__tensor__"
DICT_KEY = "__dict__"  # a dict whose keys are not all plain text, as a list of pairs


def pack(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The tree as plain JSON data, and its tensors by path ("state/0/exp_avg")."""
    tensors: dict[str, torch.Tensor] = {}
    return _pack(tree, "", tensors), tensors


def _pack(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        assert path not in tensors, f"two tensors would be stored as {path!r}"
        tensors[path or "tensor"] = node.detach().to("cpu").contiguous()
        return {TENSOR_KEY: path or "tensor"}
    if isinstance(node, dict):
        if all(isinstance(k, str) and not k.startswith("__") for k in node):
            return {k: _pack(v, f"{path}/{k}" if path else k, tensors) for k, v in node.items()}
        return {DICT_KEY: [[k, _pack(v, f"{path}/{k!r}", tensors)] for k, v in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_pack(v, f"{path}/{i}" if path else str(i), tensors) for i, v in enumerate(node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"cannot store {type(node).__name__} at {path!r}; allowed: tensors, dicts, lists, numbers, text")


def unpack(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of `pack` (tuples come back as lists)."""
    if isinstance(node, dict):
        if TENSOR_KEY in node:
            return tensors[node[TENSOR_KEY]]
        if DICT_KEY in node:
            return {k: unpack(v, tensors) for k, v in node[DICT_KEY]}
        return {k: unpack(v, tensors) for k, v in node.items()}
    if isinstance(node, list):
        return [unpack(v, tensors) for v in node]
    return node


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors (copied to the CPU; tied tensors are written under each of their names)."""
    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        cpu = tensor.detach().to("cpu").contiguous()
        plain[name] = cpu.clone() if cpu.untyped_storage().data_ptr() in seen else cpu
        seen.add(plain[name].untyped_storage().data_ptr())
    save_file(plain, str(path))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{path}: not a readable safetensors file ({e}); use another checkpoint") from None


def save_tree(stem: Path, tree: Any) -> list[Path]:
    """Write `<stem>.safetensors` and `<stem>.json`; returns both paths."""
    skeleton, tensors = pack(tree)
    files = [stem.with_suffix(".safetensors"), stem.with_suffix(".json")]
    save_tensors(files[0], tensors)
    files[1].write_text(json.dumps(skeleton), encoding="utf8")
    return files


def load_tree(stem: Path) -> Any:
    tensors = load_tensors(stem.with_suffix(".safetensors"))
    return unpack(json.loads(stem.with_suffix(".json").read_text(encoding="utf8")), tensors)
