"""The model: nanochat's GPT in plain PyTorch, with float32 weights and an explicit compute dtype.

B rows, T positions, C model_dim, H heads, K kv heads, D head_dim, V vocabulary, L layers. State-dict names are nanochat's, so
checkpoints convert by name. Unlike nanochat the embedding tables are float32 as well: look-ups are cast after the norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_model.attention import attend
from nanochat_model.config import SMEAR_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from nanochat_model.init import initial_tensor
from nanochat_model.loss import cross_entropy, softcapped_logits
from nanochat_model.native import ops as native
from nanochat_model.ops import mix_norm, relu_square, rms_norm, rotate

ROTARY_BASE = 100_000.0
QK_SCALE = 1.2  # on queries and on keys, after their norm
VE_GATE_RANGE = 3.0  # value-embedding gates lie in (0, 3)


def rotary_tables(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (num_positions, D/2)."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


class Linear(nn.Module):
    """Bias-free product with a float32 weight (out, in), done in the input's dtype."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Table(nn.Module):
    """Embedding table (V, width), float32."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        c = config.model_dim
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        self.c_q = Linear(c, c)
        self.c_k = Linear(c, config.kv_dim)
        self.c_v = Linear(c, config.kv_dim)
        self.c_proj = Linear(c, c)
        self.ve_gate = Linear(VE_GATE_CHANNELS, config.num_kv_heads) if layer in config.value_embed_layers else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C) normalized; ve (B, T, kv_dim) on layers with a value embedding; cos, sin (T, D/2)."""
        B, T, C = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.c_q, self.c_k, self.c_v))
        gate = None if self.ve_gate is None else self.ve_gate(x[..., :VE_GATE_CHANNELS])
        ve = None if ve is None else ve.view_as(v)
        if native.usable(q, cos):
            y = native.CoreAttention.apply(q, k, v, cos, sin, ve, gate, self.window, QK_SCALE, VE_GATE_RANGE)
        else:
            y = self._core(q, k, v, cos, sin, ve, gate)
        return self.c_proj(y.reshape(B, T, C))

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None
    ) -> Tensor:
        if gate is not None and ve is not None:
            v = v + (VE_GATE_RANGE * torch.sigmoid(gate)).unsqueeze(-1) * ve.to(v.dtype)
        q, k = (QK_SCALE * rms_norm(rotate(y, cos.unsqueeze(1), sin.unsqueeze(1))) for y in (q, k))
        return attend(q, k, v, self.window)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.model_dim, 4 * config.model_dim)
        self.c_proj = Linear(4 * config.model_dim, config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu_square(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, normed: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), the residual stream, and its norm; returns the stream after attention and MLP."""
        x, normed = mix_norm(x, self.attn(normed, ve, cos, sin))
        return x + self.mlp(normed)


class GPT(nn.Module):
    """The whole model. Weights are uninitialized until `init_weights` or `load_state_dict`."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: GPTConfig, *, compute_dtype: torch.dtype = torch.float32, attention: str = "auto", fp8: str = "off"
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        layers = range(config.depth)
        self.transformer = nn.ModuleDict(
            {
                "wte": Table(config.padded_vocab_size, config.model_dim),
                "h": nn.ModuleList([Block(config, i) for i in layers]),
            }
        )
        self.lm_head = Linear(config.model_dim, config.padded_vocab_size)
        self.value_embeds = nn.ModuleDict(
            {str(i): Table(config.padded_vocab_size, config.kv_dim) for i in config.value_embed_layers}
        )
        self.resid_lambdas = nn.Parameter(torch.empty(config.depth))
        self.x0_lambdas = nn.Parameter(torch.empty(config.depth))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        cos, sin = rotary_tables(config.sequence_len, config.head_dim)
        self.register_buffer("cos", cos.to(compute_dtype), persistent=False)
        self.register_buffer("sin", sin.to(compute_dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Draw the initial weights (nanochat-style, see init.py); returns self."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_tensor(name, parameter.shape, self.config, seed))
        return self

    def forward(self, idx: Tensor) -> Tensor:
        """Float32 logits (B, T, V) of token ids (B, T)."""
        return softcapped_logits(self.features(idx), self.lm_head.weight, self.config.vocab_size)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of targets (B, T), -1 ignored: 0-d for "mean" and "sum", (B, T) for "none"."""
        x = self.features(idx).flatten(0, 1)
        out = cross_entropy(x, self.lm_head.weight, targets.flatten(), self.config.vocab_size, reduction)
        return out.view_as(targets) if reduction == "none" else out

    def features(self, idx: Tensor) -> Tensor:
        """Normalized output of the last layer (B, T, C), in the compute dtype."""
        cos, sin = (t[: idx.shape[1]] for t in (self.cos, self.sin))
        x = rms_norm(self.transformer["wte"](idx)).to(self.compute_dtype)
        x = x0 = self._smear(x)
        middle = x
        for i, (block, r, l) in enumerate(
            zip(self.transformer["h"], self.resid_lambdas.unbind(), self.x0_lambdas.unbind(), strict=True)
        ):
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(*mix_norm(x, x0, r, l), ve, cos, sin)
            if i == self.config.depth // 2:
                middle = x
        return mix_norm(x, middle, None, -self.backout_lambda[0])[1]

    def _smear(self, x: Tensor) -> Tensor:
        """Mix the previous token's embedding into each position but the first."""
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
        return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)


def compile_training(model: GPT) -> None:
    """Compile the training path in place."""
    model.features = torch.compile(model.features, dynamic=False)  # type: ignore[method-assign]
