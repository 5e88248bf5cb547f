"""The products of linear layers in a training step on CPUs: in C for bfloat16 on CPUs that multiply bfloat16 pairs, else PyTorch's.

M tokens. Weights (out, in) are float32; several that read the same input are given together and count as one, stacked by outputs.
In C a weight is rounded while it is packed, and a weight's gradient is added up in float32 where it belongs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_model.native.build import kernels
from nanochat_model.native.ops import SUFFIX, address, at_once, call, scratch

MULTIPLE = 8  # of inputs and outputs, and the fewest tokens, that the C products take
WORD_BYTES = 4
PLAIN, RELU_SQUARE, RELU_SQUARE_BACKWARD, ADD = range(4)  # what follows a product, as in products.inc


def in_c(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether products of x (M, …) with these weights are done in C."""
    if x.dtype != torch.bfloat16 or x.shape[0] < MULTIPLE or x.stride(-1) != 1 or x.stride(0) % 2:
        return False
    for w in weights:
        rows, columns = w.shape
        if w.dtype != torch.float32 or rows % MULTIPLE or columns % MULTIPLE:
            return False
    return hasattr(kernels(), "product_rows")


def linear(x: Tensor, weights: Sequence[Tensor], plus: Tensor | None = None) -> Tensor:
    """x (M, in) times the transposed weights: (M, all outputs); with `plus` (M, all outputs) added."""
    if not in_c(x, weights):
        at_once()
        out = x @ _joint(weights, x.dtype).T
        return out if plus is None else out.add_(plus)
    packed, num_out = packed_outputs(weights)
    return product(x, packed, num_out) if plus is None else product(x, packed, num_out, after=ADD, other=plus.contiguous())


def linear_backward(g: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """g (M, all outputs) times the weights: the gradient (M, in) of what they read."""
    if not in_c(g, weights):
        at_once()
        return g @ _joint(weights, g.dtype)
    return product(g, packed_inputs(weights), weights[0].shape[1])


def hidden_and_square(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """h = x weightᵀ and relu(h)², both (M, out)."""
    if in_c(x, (weight,)):
        hidden = x.new_empty((len(x), len(weight)))
        return hidden, product(x, packed_outputs((weight,))[0], len(weight), after=RELU_SQUARE, other=hidden)
    hidden = linear(x, (weight,))
    return hidden, relu_square(hidden)


def hidden_backward(g: Tensor, weight: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of h where relu(h)² went through `weight` (out, in) and g (M, out) came back."""
    if in_c(g, (weight,)):
        return product(g, packed_inputs((weight,)), weight.shape[1], after=RELU_SQUARE_BACKWARD, other=hidden)
    out = linear_backward(g, (weight,))
    call("relu_square_backward" + SUFFIX[g.dtype], hidden, out, out, out.numel())
    return out


def relu_square(x: Tensor) -> Tensor:
    """relu(x)², without autograd."""
    x = x.contiguous()
    out = torch.empty_like(x)
    call("relu_square" + SUFFIX[x.dtype], x, out, x.numel())
    return out


def add_gradient(weight: Tensor, g: Tensor, x: Tensor, *, square: bool = False) -> Tensor | None:
    """Add gᵀ x (with `square` gᵀ relu(x)²) to weight.grad where there is one; otherwise return it, for autograd."""
    total, made = held_gradient(weight)
    accumulate_gradient(total, g, x, square=square)
    return made


def held_gradient(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the gradient of a float32 weight is added to, and what autograd is then handed: weight.grad and None, or twice the same
    zeros where there is none."""
    total = weight.grad
    if total is not None and total.is_contiguous() and total.dtype == torch.float32:
        return total, None
    made = torch.zeros(weight.shape, dtype=torch.float32)
    return made, made


def add_gradients(weights: Sequence[Tensor], g: Tensor, x: Tensor) -> list[Tensor | None]:
    """`add_gradient` of weights that read the same x, with their parts of g (M, all outputs). Gradients that lie one after the
    other, as an optimizer's that stacks matrices do, are one matrix: x is then packed once."""
    sizes = [w.shape[0] for w in weights]
    total = _one_matrix([w.grad for w in weights])
    if total is None:
        return [add_gradient(w, part, x) for w, part in zip(weights, g.split(sizes, dim=-1), strict=True)]
    accumulate_gradient(total, g, x)
    return [None] * len(sizes)


def _one_matrix(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The matrix whose rows these float32 matrices are, where they follow each other in one piece of memory."""
    first = parts[0]
    if first is None:
        return None
    rows, end = 0, first.data_ptr()
    for t in parts:
        if t is None or t.dtype != torch.float32 or not t.is_contiguous() or t.data_ptr() != end:
            return None
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        rows, end = rows + t.shape[0], end + t.numel() * t.element_size()
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def accumulate_gradient(total: Tensor, g: Tensor, x: Tensor, *, square: bool = False) -> None:
    """total (out, in) float32 += gᵀ x (with `square` gᵀ relu(x)²); g (M, out), x (M, in)."""
    if in_c(g, (total,)) and in_c(x, ()):
        num_out, num_in = total.shape
        words = scratch(WORD_BYTES * _gradient_scratch(num_out, num_in, torch.get_num_threads()))
        at = (address(g), address(x))
        call("weight_gradient", total, *at, words, g.stride(0), x.stride(0), g.shape[0], num_out, num_in, int(square))
        return
    at_once()
    part = g.T @ (relu_square(x) if square else x)
    call("accumulate" + SUFFIX[part.dtype], total, part, total.numel())


@contextlib.contextmanager
def weights_stay() -> Iterator[None]:
    """Within it nothing may change a weight: packed weights are kept, and every micro-batch after the first uses them again.

    It holds for this thread, in which PyTorch's backward pass of CPU tensors runs as well.
    """
    _THREAD.kept = {}
    try:
        yield
    finally:
        _THREAD.kept = None


class _Thread(threading.local):
    # Addresses of the weights -> the weights, so that no address is used again meanwhile, and what was packed.
    kept: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]] | None = None


_THREAD = _Thread()


def packed_outputs(weights: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The weights (C products only), packed for `x weightᵀ`, and their number of outputs."""
    num_in, num_out = weights[0].shape[1], sum([w.shape[0] for w in weights])

    def pack() -> Tensor:
        packed, at = _words(_packed_words(num_in, num_out)), 0
        for w in weights:
            call("pack_outputs", w, packed, w.shape[0], num_in, at)
            at += w.shape[0]
        return packed

    return _keep(0, weights, pack), num_out


def packed_inputs(weights: Sequence[Tensor]) -> Tensor:
    """The weights (C products only), packed for `g weight`."""

    def pack() -> Tensor:
        num_in, num_out = weights[0].shape[1], sum([w.shape[0] for w in weights])
        packed, at = _words(_packed_words(num_out, num_in)), 0
        for w in weights:
            call("pack_inputs", w, packed, w.shape[0], num_in, num_out, at)
            at += w.shape[0]
        return packed

    return _keep(1, weights, pack)


def _keep(way: int, weights: Sequence[Tensor], pack: Callable[[], Tensor]) -> Tensor:
    kept = _THREAD.kept
    if kept is None:
        return pack()
    key = (way, *[w.data_ptr() for w in weights])
    if key not in kept:
        kept[key] = (weights, pack())
    return kept[key][1]


def product(
    x: Tensor, packed: Tensor, width: int, *, after: int = PLAIN, other: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x (M, K), whose rows may lie apart, times a packed matrix (K, width)."""
    M, K = x.shape
    if M < MULTIPLE:  # the last tokens of a batch
        at_once()
        assert other is None
        few = product(F.pad(x, (0, 0, 0, MULTIPLE - M)), packed, width)[:M]
        return few if out is None else out.copy_(few)
    out = x.new_empty((M, width)) if out is None else out
    assert other is None or other.stride() == out.stride()
    call("product_rows", address(x), packed, out, other, x.stride(0), width, M, width, K, after)
    return out


def _joint(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (weights[0] if len(weights) == 1 else torch.cat(list(weights))).to(dtype)


def _words(count: int) -> Tensor:
    return torch.empty(WORD_BYTES * count, dtype=torch.uint8)


@functools.cache
def _packed_words(K: int, N: int) -> int:
    return _count("packed_words", K, N)


@functools.cache
def _gradient_scratch(num_out: int, num_in: int, threads: int) -> int:
    return _count("gradient_scratch", num_out, num_in, threads)


def _count(name: str, *sizes: int) -> int:
    size = getattr(kernels(), name)
    size.restype = ctypes.c_int64
    return int(size(*(ctypes.c_int64(s) for s in sizes)))
