"""A slow, obvious model to compare with: nanochat's architecture position by position, in float64 unless told otherwise.

Written from the description of the architecture, with nothing shared with nanochat_model but the config's plain numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 2.0**-23


def norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def rotary(x: Tensor, position: int) -> Tensor:
    """x (..., D) turned by the angles of `position`: pair (d, d + D/2) by -position · 100000^(-2d/D)."""
    D = x.shape[-1]
    out = torch.empty_like(x)
    for d in range(D // 2):
        angle = position * 100000.0 ** (-2 * d / D)
        a, b = x[..., d], x[..., d + D // 2]
        out[..., d] = a * math.cos(angle) + b * math.sin(angle)
        out[..., d + D // 2] = -a * math.sin(angle) + b * math.cos(angle)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q (B, T, H, D), k and v (B, T, K, D): one query at a time."""
    _, T, H, D = q.shape
    group = H // k.shape[2]
    rows = []
    for t in range(T):
        first = max(0, t - window)
        heads = []
        for h in range(H):
            logits = (q[:, t, h, None] * k[:, first : t + 1, h // group]).sum(-1) / math.sqrt(D)
            heads.append((torch.softmax(logits, -1)[..., None] * v[:, first : t + 1, h // group]).sum(1))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows, 1)


def windows(config: dict) -> list[int]:
    T, pattern, L = config["sequence_len"], config["window_pattern"], config["n_layer"]
    short = math.ceil(T / 4 / 128) * 128
    sizes = [T if pattern[i % len(pattern)] == "L" else short for i in range(L)]
    return [*sizes[:-1], T]


def attention_layer(w: dict[str, Tensor], config: dict, layer: int, x: Tensor, idx: Tensor) -> Tensor:
    """x (B, T, C) normalized."""
    B, T, C = x.shape
    D = C // config["n_head"]
    p = f"transformer.h.{layer}.attn."
    q, k, v = ((x @ w[p + n + ".weight"].T).view(B, T, -1, D) for n in ("c_q", "c_k", "c_v"))
    if f"value_embeds.{layer}.weight" in w:
        gate = 3 * torch.sigmoid(x[..., :12] @ w[p + "ve_gate.weight"].T)
        v = v + gate[..., None] * w[f"value_embeds.{layer}.weight"][idx].view(B, T, -1, D)
    q, k = (1.2 * norm(torch.stack([rotary(y[:, t], t) for t in range(T)], 1)) for y in (q, k))
    return attention(q, k, v, windows(config)[layer]).reshape(B, T, C) @ w[p + "c_proj.weight"].T


def logits(w: dict[str, Tensor], config: dict, idx: Tensor) -> Tensor:
    """Logits (B, T, V) under the weights `w` (nanochat's names) and `config` (nanochat's model_config)."""
    L = config["n_layer"]
    embedded = norm(w["transformer.wte.weight"][idx])
    x = embedded.clone()
    for t in range(1, idx.shape[1]):
        gate = w["smear_lambda"] * torch.sigmoid(embedded[:, t, :24] @ w["smear_gate.weight"].T)
        x[:, t] = embedded[:, t] + gate * embedded[:, t - 1]
    x0 = x
    for i in range(L):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        x = x + attention_layer(w, config, i, norm(x), idx)
        hidden = torch.clamp(norm(x) @ w[f"transformer.h.{i}.mlp.c_fc.weight"].T, min=0) ** 2
        x = x + hidden @ w[f"transformer.h.{i}.mlp.c_proj.weight"].T
        if i == L // 2:
            kept = x
    x = norm(x - w["backout_lambda"] * kept)
    raw = x @ w["lm_head.weight"][: config["vocab_size"]].T
    return 15 * torch.tanh(raw / 15)


def cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets other than -1 of -log softmax(z)[target]; z (N, V)."""
    total = z.new_zeros(())
    for row, t in zip(z, targets.tolist(), strict=True):
        if t >= 0:
            total = total + torch.logsumexp(row, 0) - row[t]
    return total


def model_config(*, depth: int, dim: int, heads: int, kv_heads: int, T: int, vocab: int, pattern: str) -> dict:
    """nanochat's model_config."""
    return {
        "sequence_len": T, "vocab_size": vocab, "n_layer": depth, "n_head": heads, "n_kv_head": kv_heads, "n_embd": dim,
        "window_pattern": pattern,
    }  # fmt: skip


def random_weights(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights that leave no part of the model idle."""
    g = torch.Generator().manual_seed(seed)
    C, L, V = config["n_embd"], config["n_layer"], math.ceil(config["vocab_size"] / 64) * 64
    kv = C // config["n_head"] * config["n_kv_head"]
    shapes = {"transformer.wte.weight": (V, C), "lm_head.weight": (V, C), "smear_gate.weight": (1, 24), "smear_lambda": (1,)}
    shapes |= {"backout_lambda": (1,), "resid_lambdas": (L,), "x0_lambdas": (L,)}
    for i in range(L):
        p = f"transformer.h.{i}."
        shapes |= {f"{p}attn.c_q.weight": (C, C), f"{p}attn.c_k.weight": (kv, C), f"{p}attn.c_v.weight": (kv, C)}
        shapes |= {f"{p}attn.c_proj.weight": (C, C), f"{p}mlp.c_fc.weight": (4 * C, C), f"{p}mlp.c_proj.weight": (C, 4 * C)}
        if i % 2 == (L - 1) % 2:
            shapes |= {f"{p}attn.ve_gate.weight": (config["n_kv_head"], 12), f"value_embeds.{i}.weight": (V, kv)}
    out = {n: torch.randn(s, generator=g) * (s[-1] ** -0.5 if len(s) == 2 else 0.3) for n, s in shapes.items()}
    out["resid_lambdas"] += 1.0
    return out
