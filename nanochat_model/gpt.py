"""The model: nanochat's GPT in plain PyTorch, with float32 weights and an explicit compute dtype.

B rows, T positions, C model_dim, H heads, K kv heads, D head_dim, V vocabulary, L layers. State-dict names are nanochat's, so
checkpoints convert by name. Unlike nanochat the embedding tables are float32 as well: look-ups are cast after the norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_model import attention
from nanochat_model.attention_backends import Kernel, choose_backend
from nanochat_model.config import SMEAR_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from nanochat_model.device import compile_fixed
from nanochat_model.errors import ConfigError
from nanochat_model.fp8 import RECIPES, eligible, fp8_linear
from nanochat_model.init import initial_tensor
from nanochat_model.loss import IGNORE_INDEX, cross_entropy, softcapped_logits
from nanochat_model.native import ops as native
from nanochat_model.native.attention import Meaning, core_attention
from nanochat_model.native.block import Reading, TrainedBlock, trainable_in_one
from nanochat_model.native.layers import Embed, Feedforward, Look
from nanochat_model.ops import mix_norm, relu_square, rms_norm, rotate

if TYPE_CHECKING:
    from nanochat_model.engine import KVCache

ROTARY_BASE = 100_000.0
CONTEXT_MULTIPLE = 10  # positions a model can read, in training lengths (nanochat's rotary tables)
QK_SCALE = 1.2  # on queries and on keys, after their norm
VE_GATE_RANGE = 3.0  # value-embedding gates lie in (0, 3)


def rotary_tables(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (num_positions, D/2)."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


class Linear(nn.Module):
    """Bias-free product with a float32 weight (out, in), done in the input's dtype; in fp8 while training if told so."""

    def __init__(self, num_in: int, num_out: int, *, fp8: str = "off") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.fp8 = fp8 if eligible(num_in, num_out) else "off"

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 != "off" and self.training:
            return fp8_linear(x, self.weight, self.fp8)
        return F.linear(x, self.weight.to(x.dtype))


class Table(nn.Module):
    """Embedding table (V, width), float32."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, idx: Tensor) -> Tensor:
        if torch.is_grad_enabled() and native.usable(self.weight):
            return Look.apply(self.weight, idx)
        return F.embedding(idx, self.weight)


class Attention(nn.Module):
    """One layer's attention. `kernel` is set by GPT.choose_attention before the first use on a device."""

    def __init__(self, config: GPTConfig, layer: int, *, fp8: str = "off") -> None:
        super().__init__()
        c = config.model_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        self.kernel: Kernel = attention.blocked
        self.meaning = Meaning(window=self.window, qk_scale=QK_SCALE, ve_range=VE_GATE_RANGE)
        self.c_q = Linear(c, c, fp8=fp8)
        self.c_k = Linear(c, config.kv_dim, fp8=fp8)
        self.c_v = Linear(c, config.kv_dim, fp8=fp8)
        self.c_proj = Linear(c, c, fp8=fp8)
        self.ve_gate = Linear(VE_GATE_CHANNELS, config.num_kv_heads) if layer in config.value_embed_layers else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, C) normalized; ve (B, T, kv_dim) on layers with a value embedding; cos, sin (T, D/2), or (B, T, D/2)."""
        B, T, C = x.shape
        if cache is None and self.kernel is attention.blocked and native.usable(x, cos):
            q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.c_q, self.c_k, self.c_v))
            gate = None if self.ve_gate is None else self.ve_gate(x[..., :VE_GATE_CHANNELS])
            ve = None if ve is None else ve.view_as(v)
            y = core_attention(q, k, v, cos, sin, ve, gate, self.meaning)
        else:
            q, k = self.queries_keys(x, cos, sin)
            y = self._attend(q, k, self._values(x, ve), cache)
        return self.c_proj(y.reshape(B, T, C))

    def queries_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, T, H, D) and keys (B, T, K, D) after rotary embedding, norm and scale."""
        q, k = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.c_q, self.c_k))
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return QK_SCALE * rms_norm(rotate(q, cos, sin)), QK_SCALE * rms_norm(rotate(k, cos, sin))

    def _values(self, x: Tensor, ve: Tensor | None) -> Tensor:
        v = self.c_v(x).unflatten(-1, (-1, self.head_dim))
        if self.ve_gate is None or ve is None:
            return v
        gate = VE_GATE_RANGE * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))
        return v + gate.unsqueeze(-1) * ve.to(v.dtype).view_as(v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None) -> Tensor:
        if cache is None:
            return self.kernel(q, k, v, self.window)
        positions = cache.positions(q.shape[1])
        keys, values = cache.extend(self.layer, k, v, positions)
        if cache.longest == 0:  # a first prompt sees only itself
            return self.kernel(q, k, v, self.window)
        return attention.cached(q, keys, values, positions, self.window)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, *, fp8: str = "off") -> None:
        super().__init__()
        self.c_fc = Linear(config.model_dim, 4 * config.model_dim, fp8=fp8)
        self.c_proj = Linear(4 * config.model_dim, config.model_dim, fp8=fp8)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + MLP of x, both (B, T, C)."""
        if torch.is_grad_enabled() and native.usable(x, residual):
            return Feedforward.apply(x, residual, self.c_fc.weight, self.c_proj.weight)
        return residual + self.c_proj(relu_square(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, *, fp8: str = "off") -> None:
        super().__init__()
        self.attn = Attention(config, layer, fp8=fp8)
        self.mlp = MLP(config, fp8=fp8)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        r: Tensor,
        l: Tensor,
        value_table: Table | None,
        idx: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The residual stream (B, T, C) after this block: of r·x + l·x0, x0 being the embeddings of idx (B, T) and r, l 0-d."""
        attn, mlp = self.attn, self.mlp
        # without gradients the modules run, for their hooks
        if torch.is_grad_enabled() and cache is None and attn.kernel is attention.blocked and trainable_in_one(x, attn.head_dim):
            reading = Reading(idx=idx.contiguous(), cos=cos, sin=sin, head_dim=attn.head_dim, meaning=attn.meaning)
            linears = (attn.c_q, attn.c_k, attn.c_v, attn.c_proj, mlp.c_fc, mlp.c_proj, attn.ve_gate, value_table)
            return TrainedBlock.apply(x, x0, r, l, reading, *(None if m is None else m.weight for m in linears))
        x, normed = mix_norm(x, x0, r, l)
        x, normed = mix_norm(x, attn(normed, None if value_table is None else value_table(idx), cos, sin, cache))
        return mlp(normed, x)


class GPT(nn.Module):
    """The whole model. Weights are uninitialized until `init_weights` or `load_state_dict`."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: GPTConfig, *, compute_dtype: torch.dtype = torch.float32, attention: str = "auto", fp8: str = "off"
    ) -> None:
        super().__init__()
        if fp8 not in ("off", *RECIPES):
            raise ConfigError(f"fp8 {fp8!r} is not known; choose off, {' or '.join(RECIPES)}")
        self.config = config
        self.compute_dtype = compute_dtype
        self.attention_choice = attention
        self._attention_device = torch.device("meta")
        layers = range(config.depth)
        self.transformer = nn.ModuleDict(
            {
                "wte": Table(config.padded_vocab_size, config.model_dim),
                "h": nn.ModuleList([Block(config, i, fp8=fp8) for i in layers]),
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
        cos, sin = rotary_tables(self.max_tokens, config.head_dim)
        self.register_buffer("cos", cos.to(compute_dtype), persistent=False)
        self.register_buffer("sin", sin.to(compute_dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Draw the initial weights (nanochat-style, see init.py); returns self."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_tensor(name, parameter.shape, self.config, seed))
        return self

    @property
    def max_tokens(self) -> int:
        """Positions the model can read; attention still reaches at most sequence_len to the left."""
        return CONTEXT_MULTIPLE * self.config.sequence_len

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(cast(nn.ModuleList, self.transformer["h"])))

    def choose_attention(self, device: torch.device) -> str:
        """Fix the attention kernel for `device`; returns its name. Called by the first forward pass there if not before."""
        shapes = {(self.config.sequence_len, window) for window in self.config.windows}
        windowed = min(self.config.windows) < self.config.sequence_len
        backend = choose_backend(self.attention_choice, device, self.compute_dtype, windowed=windowed, shapes=shapes)
        for block in self.blocks:
            block.attn.kernel = backend.kernel
        self._attention_device = device
        return backend.name

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Float32 logits (B, T, V) of token ids (B, T); with a cache these follow what it holds and are added to it.

        Raises ConfigError on ids that are not whole numbers of this shape and vocabulary, and on more than `max_tokens` positions.
        """
        idx = checked_ids(idx, self.config.vocab_size)
        return softcapped_logits(self._features(idx, cache), self.lm_head.weight, self.config.vocab_size)

    def next_logits(self, idx: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, V) after the last token of each row of ids (B, T), which join the cache. `lengths` (B,): how many of a
        row's ids count, for a first batch of padded prompts."""
        x = self._features(idx, cache, lengths)
        x = x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1]
        return softcapped_logits(x, self.lm_head.weight, self.config.vocab_size)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of targets (B, T), -1 ignored: 0-d for "mean" and "sum", (B, T) for "none". Raises as `forward`."""
        idx, targets = checked_ids(idx, self.config.vocab_size), checked_ids(targets, self.config.vocab_size, least=IGNORE_INDEX)
        x = self.features(idx).flatten(0, 1)
        out = cross_entropy(x, self.lm_head.weight, targets.flatten(), self.config.vocab_size, reduction)
        return out.view_as(targets) if reduction == "none" else out

    def features(self, idx: Tensor) -> Tensor:
        """Normalized output of the last layer (B, T, C), in the compute dtype. This is what training compiles."""
        return self._features(idx, None)

    def _features(self, idx: Tensor, cache: KVCache | None, lengths: Tensor | None = None) -> Tensor:
        T = idx.shape[1]
        if self._attention_device != idx.device:
            self.choose_attention(idx.device)
        if self.max_tokens < T:
            raise ConfigError(f"{T} tokens exceed the model's {self.max_tokens} positions; shorten the input")
        at = slice(T) if cache is None else cache.positions(T).clamp_max(self.max_tokens - 1)
        cos, sin = self.cos[at], self.sin[at]
        x = self._embed(idx, cache, lengths)
        x0 = middle = x
        tables = cast(dict[str, Table], dict(self.value_embeds.items()))
        lambdas = zip(self.blocks, self.resid_lambdas.unbind(), self.x0_lambdas.unbind(), strict=True)
        for i, (block, r, l) in enumerate(lambdas):
            x = block(x, x0, r, l, tables.get(str(i)), idx, cos, sin, cache)
            if i == self.config.depth // 2:
                middle = x
        if cache is not None:
            cache.advance(T if lengths is None else lengths, cache.longest + T)
        return mix_norm(x, middle, None, -self.backout_lambda[0])[1]

    def _embed(self, idx: Tensor, cache: KVCache | None, lengths: Tensor | None) -> Tensor:
        """Normalized embeddings (B, T, C), each mixed with that of the token before it (smear)."""
        table = cast(Table, self.transformer["wte"])
        # In float32 the parts stay apart: another order of rounding moves the stored traces, through the scalars' first gradients.
        in_one = cache is None and self.compute_dtype == torch.bfloat16 and native.usable(table.weight)
        if in_one and torch.is_grad_enabled():
            return Embed.apply(table.weight, idx, self.smear_gate.weight, self.smear_lambda)
        x = rms_norm(table(idx)).to(self.compute_dtype)
        if cache is None:
            gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
            return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        before = torch.cat([cache.last, x[:, :-1]], dim=1)
        cache.last = x[:, -1:] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1].unsqueeze(1)
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * before


def checked_ids(ids: Tensor, vocab_size: int, least: int = 0) -> Tensor:
    """`ids` as int64, after checking that they are (B, T) whole numbers in least..vocab_size-1. Raises ConfigError.

    The kernels read what the ids point at, so one that leaves the table must not reach them. On a GPU the range is left to torch's
    own assertion there: looking at the ids would wait for the device.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ConfigError(f"token ids are {found}; give a tensor of whole numbers of shape (rows, positions)")
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        if low < least or high >= vocab_size:
            raise ConfigError(f"token ids {low}..{high} leave the vocabulary {least}..{vocab_size - 1}; use the model's tokenizer")
    return ids.long()


def compile_training(model: GPT) -> None:
    """Compile the training path in place: the trunk; the loss keeps its own chunks. Call after the model is on its device."""
    model.choose_attention(model.lm_head.weight.device)
    model.features = compile_fixed(model.features)  # type: ignore[method-assign]
