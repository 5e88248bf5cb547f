"""The C kernels as autograd functions on CPU tensors of float32 or bfloat16.

Each has a pure PyTorch twin with the same meaning in nanochat_model.ops, which is what these are tested against. Shapes:
B rows, T positions, H query heads, K kv heads, D head_dim, C channels, N = B·T.
"""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import torch
from torch import Tensor

from nanochat_model.native.build import kernels

PIECE = 64  # rows of a partial sum, as in kernels.inc
SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}
EPS = float(torch.finfo(torch.float32).eps)  # of torch's rms_norm, which computes bf16 in float32


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on the CPU, of one supported dtype, compiled, and not being traced."""
    dtype = tensors[0].dtype
    if dtype not in SUFFIX or torch.compiler.is_compiling() or not all(t.is_cpu and t.dtype == dtype for t in tensors):
        return False
    return kernels() is not None  # asked last: the first time they are compiled, which a GPU has no use for


def _call(name: str, dtype: torch.dtype, *args: Tensor | int | float | None) -> None:
    call(name + SUFFIX[dtype], *args)


def call(name: str, *args: Tensor | int | float | None) -> None:
    """Call a kernel: tensors by address (they must be contiguous), ints as int64, floats as float; the thread count is added.

    What is an int, a float or an address at the first call of a kernel stays one.
    """
    kernel = _KERNELS.get((name, len(args))) or _declared(name, args)
    values = [a if a.__class__ in _NUMBERS else 0 if a is None else _address(a) for a in args]
    values.append(torch.get_num_threads())
    if _QUEUE.calls is None:
        kernel(*values)
    else:
        _QUEUE.calls.append((kernel, values))
        _QUEUE.held.append(args)


class together:
    """Within it kernels wait, and run one right after the other when it ends.

    Between two kernels that go through megabytes nothing of Python is left in the caches, so preparing a call takes 0.2 ms there
    and a few µs in one go. Whatever reads what a kernel makes must be a kernel as well, or come after the end.
    """

    def __enter__(self) -> None:
        assert _QUEUE.calls is None
        _QUEUE.calls = []

    def __exit__(self, kind: object, *_: object) -> None:
        calls, _QUEUE.calls, _QUEUE.scratch = _QUEUE.calls, None, None
        if kind is None:
            for kernel, values in calls or ():
                kernel(*values)
        _QUEUE.held.clear()


class _Queue(threading.local):
    calls: list[tuple[Any, list[int | float]]] | None = None  # waiting kernels and what they are called with
    scratch: Tensor | None = None

    def __init__(self) -> None:
        self.held: list[Any] = []  # what these read and write, which must live until then


_QUEUE = _Queue()


def at_once() -> None:
    """Asserts that no kernel waits: what follows reads results."""
    assert _QUEUE.calls is None, "this reads what waiting kernels will make"


def address(tensor: Tensor) -> int:
    """Where a tensor lies whose rows may be apart, for `call`; it lives until waiting kernels have run."""
    if _QUEUE.calls is not None:
        _QUEUE.held.append(tensor)
    return tensor.data_ptr()


def scratch(num_bytes: int) -> Tensor:
    """Memory for the length of one call; calls that wait together share it."""
    if _QUEUE.calls is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    if _QUEUE.scratch is None or _QUEUE.scratch.numel() < num_bytes:
        _QUEUE.scratch = torch.empty(num_bytes, dtype=torch.uint8)
    return _QUEUE.scratch


_NUMBERS = (int, float)
_KERNELS: dict[tuple[str, int], Any] = {}


def _address(tensor: Any) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _declared(name: str, args: tuple[Tensor | int | float | None, ...]) -> Any:
    """The kernel with its argument types, so that ctypes converts plain numbers itself: a step makes hundreds of calls."""
    library = kernels()
    assert library is not None
    kernel = library[name]  # a function object of its own, unlike an attribute
    kernel.argtypes = [*(ctypes.c_float if isinstance(a, float) else ctypes.c_int64 for a in args), ctypes.c_int]
    kernel.restype = None
    _KERNELS[name, len(args)] = kernel
    return kernel


class MixNorm(torch.autograd.Function):
    """(s, n): s = r·x + l·y and n = rms_norm(s). r and l are 0-d float32 tensors, None for 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, r: Tensor | None, l: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = x.contiguous(), y.contiguous()
        ctx.factors = (1.0 if r is None else r.item(), 1.0 if l is None else l.item())
        ctx.learned = r is not None or l is not None
        ctx.has_r = r is not None
        s, n, inv = mixed(x, y, *ctx.factors)
        ctx.save_for_backward(s, inv, *((x, y) if ctx.learned else ()))
        ctx.set_materialize_grads(False)
        return s, n

    @staticmethod
    def backward(ctx: Any, gs: Tensor | None, gn: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        s, inv, *inputs = ctx.saved_tensors
        gn = torch.zeros_like(s) if gn is None else gn.contiguous()
        gs = None if gs is None else gs.contiguous()
        if not ctx.learned:
            gx = mixed_backward(gs, gn, s, inv)
            return gx, gx, None, None
        gx, gy, sums = mixed_backward_learned(gs, gn, s, inv, *inputs, *ctx.factors)
        g_r, g_l = sums.sum(0).float().unbind()
        return gx, gy, g_r if ctx.has_r else None, g_l


def mixed(x: Tensor, y: Tensor, r: float, l: float, s: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """s = r·x + l·y (into `s` if given, which may be x or y), its norm, and 1/√ of the mean squares (rows,) float32."""
    C = x.shape[-1]
    rows = x.numel() // C
    s = torch.empty_like(x) if s is None else s
    n, inv = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    call(_mix_name("mix_norm", x), x, y, r, l, s, n, inv, rows, C, EPS)
    return s, n, inv


def mixed_backward(gs: Tensor | None, gn: Tensor, s: Tensor, inv: Tensor) -> Tensor:
    """The gradient of x and of y in s = x + y, given those of s and of its norm."""
    C = s.shape[-1]
    gx = torch.empty_like(s)
    call(_mix_name("mix_norm_backward", s), gs, gn, s, inv, s, s, 1.0, 1.0, gx, gx, None, 0, s.numel() // C, C)
    return gx


def mixed_backward_learned(
    gs: Tensor | None, gn: Tensor, s: Tensor, inv: Tensor, x: Tensor, y: Tensor, r: float, l: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and y in s = r·x + l·y, and partial sums (pieces, 2) float64 of those of r and l."""
    C = s.shape[-1]
    rows = s.numel() // C
    gx, gy = torch.empty_like(s), torch.empty_like(s)
    sums = torch.empty((-(-rows // PIECE), 2), dtype=torch.float64)
    call(_mix_name("mix_norm_backward", s), gs, gn, s, inv, x, y, r, l, gx, gy, sums, 1, rows, C)
    return gx, gy, sums


def _mix_name(name: str, x: Tensor) -> str:
    """The kernel for x's dtype, in whole vectors where the CPU and the channels allow it."""
    whole = x.dtype == torch.bfloat16 and x.shape[-1] % 16 == 0 and hasattr(kernels(), "mix_norm_vectors")
    return name + ("_vectors" if whole else SUFFIX[x.dtype])


class ReluSquare(torch.autograd.Function):
    """relu(x)²."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _call("relu_square", x.dtype, x, out, x.numel())
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _call("relu_square_backward", x.dtype, x, g.contiguous(), out, x.numel())
        return out


def cross_entropy_rows(raw: Tensor, targets: Tensor, cap: float, losses: Tensor, *, want_grad: bool) -> None:
    """Losses (n,) float32 of raw logits (n, V) after the soft cap; with want_grad `raw` becomes the gradient of their sum."""
    n, V = raw.shape
    in_vectors = raw.dtype == torch.bfloat16 and hasattr(kernels(), "cross_entropy_vectors")
    name = "cross_entropy_vectors" if in_vectors else "cross_entropy" + SUFFIX[raw.dtype]
    call(name, raw, targets.contiguous(), losses, scratch(8 * (V + 32) * torch.get_num_threads()), n, V, cap, int(want_grad))


class CoreAttention(torch.autograd.Function):
    """Everything between the projections: rotary, QK norm and scale, gated value embeddings, windowed causal attention.

    q (B, T, H, D), k and v (B, T, K, D); cos, sin (T, D/2) in their dtype; ve (B, T, K, D) float32 and gate logits (B, T, K), or
    both None. Returns (B, T, H, D). Softmax as in attention.BlockedAttention (whose notes hold here too).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        ve: Tensor | None,
        gate: Tensor | None,
        window: int,
        qk_scale: float,
        ve_range: float,
    ) -> Tensor:
        from nanochat_model.attention import SAVE_WEIGHTS_MAX, blocks

        B, T, H, D = q.shape
        K = k.shape[2]
        dtype = q.dtype
        q_scale = qk_scale / math.sqrt(D)
        qr, kr, vr = (t.new_empty((B, t.shape[2], T, D)) for t in (q, k, v))
        _call("rotary_norm", dtype, q, cos, sin, qr, B, T, H, D, EPS, q_scale)
        _call("rotary_norm", dtype, k, cos, sin, kr, B, T, K, D, EPS, qk_scale)
        if gate is None or ve is None:
            vr.copy_(v.transpose(1, 2))
        else:
            _call("gated_values", dtype, v, ve, gate, vr, B, T, K, D, ve_range)
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        sums: list[Tensor] = []
        for start, stop, first in blocks(T, window):
            e, total = _exp_block(qr, kr, start, stop, first, window)
            o = torch.bmm(e, vr.view(B * K, T, D)[:, first:stop])
            _call("divide_rows", dtype, o, total, out, B, T, H, D, start, stop - start)
            sums.append(total)
            if T <= SAVE_WEIGHTS_MAX:
                kept.append(e)
        ctx.save_for_backward(q, k, cos, sin, qr, kr, vr, out, *((ve, gate) if gate is not None else ()), *sums, *kept)
        ctx.meta = (B, T, H, K, D, window, q_scale, qk_scale, ve_range, gate is not None, len(sums))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from nanochat_model.attention import blocks

        B, T, H, K, D, window, q_scale, k_scale, ve_range, gated, num_blocks = ctx.meta
        q, k, cos, sin, qr, kr, vr, out, *rest = ctx.saved_tensors
        ve, gate, *rest = rest if gated else (None, None, *rest)
        sums, kept = rest[:num_blocks], rest[num_blocks:]
        g = g.contiguous()
        gqr = torch.empty_like(qr)
        gkr, gvr = (torch.zeros((B * K, T, D), dtype=torch.float32) for _ in range(2))
        q_rows, k_rows, v_rows = qr.view(B * K, H // K, T, D), kr.view(B * K, T, D), vr.view(B * K, T, D)
        for i, (start, stop, first) in enumerate(blocks(T, window)):
            n = stop - start
            rows = H // K * n
            e = kept[i] if kept else _exp_block(qr, kr, start, stop, first, window)[0]
            gs = g.new_empty((B * K, rows, D))
            delta = torch.empty((B * K, rows), dtype=torch.float32)
            _call("divide_rows_backward", g.dtype, g, out, sums[i], gs, delta, B, T, H, D, start, n)
            gvr[:, first:stop] += torch.bmm(e.mT, gs)
            ds = torch.bmm(gs, v_rows[:, first:stop].mT)
            _call("softmax_backward", ds.dtype, ds, e, delta, B * K * rows, stop - first)
            gqr.view(B * K, H // K, T, D)[:, :, start:stop] = torch.bmm(ds, k_rows[:, first:stop]).view(B * K, H // K, n, D)
            gkr[:, first:stop] += torch.bmm(ds.mT, q_rows[:, :, start:stop].reshape(B * K, rows, D))
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), k.new_empty((B, T, K, D))
        _call("rotary_norm_backward", g.dtype, gqr.float(), q, cos, sin, gq, B, T, H, D, EPS, q_scale)
        _call("rotary_norm_backward", g.dtype, gkr, k, cos, sin, gk, B, T, K, D, EPS, k_scale)
        gve = ggate = None
        if gate is None or ve is None:
            gv.copy_(gvr.view(B, K, T, D).transpose(1, 2))
        else:
            gve, ggate = torch.empty_like(ve), torch.empty_like(gate)
            _call("gated_values_backward", g.dtype, gvr, ve, gate, gv, gve, ggate, B, T, K, D, ve_range)
        return gq, gk, gv, None, None, gve, ggate, None, None, None


def _exp_block(qr: Tensor, kr: Tensor, start: int, stop: int, first: int, window: int) -> tuple[Tensor, Tensor]:
    """exp of the visible logits (B·K, G·n, m), 0 elsewhere, and the row sums (B·K, G·n)."""
    B, H, T, D = qr.shape
    K = kr.shape[1]
    n, m = stop - start, stop - first
    rows = qr.view(B * K, H // K, T, D)[:, :, start:stop].reshape(B * K, H // K * n, D)
    e = torch.bmm(rows, kr.view(B * K, T, D)[:, first:stop].mT)
    sums = torch.empty((B * K, H // K * n), dtype=torch.float32)
    _call("exp_visible", e.dtype, e, sums, B * H, n, m, start - first, window)
    return e, sums
