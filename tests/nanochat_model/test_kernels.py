"""Each kernel against an obvious reference, forward and backward, in float32 and bf16, C and PyTorch."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import reference_model as ref
import torch
from closeness import DTYPES, close, leaves, needs_native, tolerance
from torch import Tensor

from nanochat_model import attention, attention_backends, fp8, loss, ops
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import rotary_tables
from nanochat_model.native import ops as native
from nanochat_model.native.attention import Meaning, core_attention, fused

torch.set_num_threads(1)


def normalized(*shape: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    return 1.2 * ref.norm(x)


ATTENTION_CASES = [  # B, T, H, K, D, window
    (2, 40, 2, 2, 16, 40),
    (1, 150, 4, 2, 8, 150),
    (1, 300, 2, 1, 16, 128),
    (2, 33, 6, 3, 4, 5),
    (1, 130, 1, 1, 32, 1),
    (1, 17, 2, 2, 6, 1000),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize("B, T, H, K, D, window", ATTENTION_CASES)
def test_attention_with_windows_and_grouped_keys(kernel, dtype, B, T, H, K, D, window):
    g = torch.Generator().manual_seed(T)
    q, k = normalized(B, T, H, D, generator=g), normalized(B, T, K, D, generator=g)
    fast, slow = leaves(q, k, torch.randn(B, T, K, D, generator=g), dtype=dtype)
    out, expected = getattr(attention, kernel)(*fast, window), ref.attention(*slow, window)
    close(out, expected, dtype, "output")
    grad = torch.randn(out.shape, generator=g)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    for name, a, b in zip("qkv", fast, slow, strict=True):
        close(a.grad, b.grad, dtype, f"d{name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_remade_in_backward_equals_attention_kept(dtype, monkeypatch):
    g = torch.Generator().manual_seed(0)
    tensors = [normalized(1, 200, 2, 16, generator=g) for _ in range(3)]
    results = []
    for keep in (1000, 10):
        monkeypatch.setattr(attention, "SAVE_WEIGHTS_MAX", keep)
        fast, _ = leaves(*tensors, dtype=dtype)
        out = attention.blocked(*fast, 128)
        out.float().square().sum().backward()
        results.append([out, *(t.grad for t in fast)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("window", [3, 100])
def test_cached_attention_sees_each_row_up_to_its_own_position(window):
    g = torch.Generator().manual_seed(0)
    B, S, H, K, D = 3, 20, 4, 2, 8
    q, k, v = (torch.randn(B, n, h, D, generator=g) for n, h in ((2, H), (S, K), (S, K)))
    positions = torch.tensor([[4, 5], [18, 19], [0, 1]])
    found = attention.cached(q, k, v, positions, window)
    for b in range(B):
        for i, position in enumerate(positions[b].tolist()):
            padded = torch.zeros(1, position + 1, H, D)
            padded[0, position] = q[b, i]
            expected = ref.attention(padded, k[b : b + 1, : position + 1], v[b : b + 1, : position + 1], window)
            torch.testing.assert_close(found[b, i], expected[0, position], atol=1e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("products", ["in C", "of torch"])
@pytest.mark.parametrize(
    "B, T, H, K, D, window",
    [(2, 40, 2, 2, 16, 40), (1, 150, 4, 2, 32, 128), (1, 140, 3, 1, 20, 7), (1, 9, 2, 2, 128, 9), (1, 67, 2, 2, 48, 33)],
)
def test_fused_attention_layer(dtype, gated, products, B, T, H, K, D, window, monkeypatch):
    """Rotary, QK norm, gated value embeddings and attention in one autograd node."""
    if products == "in C" and not fused(dtype, D):
        pytest.skip("this CPU, dtype or head size has no attention in C")
    g = torch.Generator().manual_seed(T)
    shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D), (B, T, K, D), (B, T, K))
    fast, slow = leaves(*(torch.randn(s, generator=g) for s in shapes), dtype=dtype)
    fast[3] = fast[3].detach().float().requires_grad_()  # value embeddings are float32
    cos, sin = (t.to(dtype) for t in rotary_tables(T, D))
    ve, gate = (fast[3], fast[4]) if gated else (None, None)
    monkeypatch.setattr(attention, "SAVE_WEIGHTS_MAX", 1000 if gated else 0)
    if products == "in C":
        out = core_attention(*fast[:3], cos, sin, ve, gate, Meaning(window=window, qk_scale=1.2, ve_range=3.0))
    else:
        out = native.CoreAttention.apply(*fast[:3], cos, sin, ve, gate, window, 1.2, 3.0)

    q, k, v = slow[:3]
    if gated:
        v = v + 3 * torch.sigmoid(slow[4])[..., None] * slow[3]
    q, k = (1.2 * ref.norm(torch.stack([ref.rotary(y[:, t], t) for t in range(T)], 1)) for y in (q, k))
    expected = ref.attention(q, k, v, window)
    close(out, expected, dtype, "output")
    grad = torch.randn(out.shape, generator=g)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    for name, a, b in list(zip(("q", "k", "v", "ve", "gate"), fast, slow, strict=True))[: 5 if gated else 3]:
        close(a.grad, b.grad, dtype, f"d{name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_turns_by_minus_the_angle(dtype):
    g = torch.Generator().manual_seed(0)
    (fast,), (slow,) = leaves(torch.randn(1, 30, 2, 12, generator=g), dtype=dtype)
    cos, sin = (t.to(dtype).unsqueeze(1) for t in rotary_tables(30, 12))
    out, expected = ops.rotate(fast, cos, sin), torch.stack([ref.rotary(slow[:, t], t) for t in range(30)], 1)
    close(out, expected, dtype, "output")
    grad = torch.randn(out.shape, generator=g)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    close(fast.grad, slow.grad, dtype, "dx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learned", ["both", "second", "none"])
@pytest.mark.parametrize("rows, C", [(70, 32), (3, 7), (130, 64)])
def test_mix_norm(dtype, learned, rows, C):
    g = torch.Generator().manual_seed(rows)
    fast, slow = leaves(torch.randn(rows, C, generator=g), torch.randn(rows, C, generator=g), dtype=dtype)
    factors, slow_factors = leaves(torch.tensor(1.1), torch.tensor(-0.3), dtype=torch.float32)
    r, l = {"both": factors, "second": [None, factors[1]], "none": [None, None]}[learned]
    s, n = ops.mix_norm(*fast, r, l)
    es = (slow_factors[0] if learned == "both" else 1) * slow[0] + (1 if learned == "none" else slow_factors[1]) * slow[1]
    en = ref.norm(es)
    close(s, es, dtype, "sum")
    close(n, en, dtype, "norm")
    gs, gn = (torch.randn(rows, C, generator=g).to(dtype) for _ in range(2))
    torch.autograd.backward([s, n], [gs, gn])
    torch.autograd.backward([es, en], [gs.double(), gn.double()])
    used = {"both": (0, 1), "second": (1,), "none": ()}[learned]
    for name, a, b in [("x", fast[0], slow[0]), ("y", fast[1], slow[1])]:
        close(a.grad, b.grad, dtype, f"d{name}")
    for i in used:
        assert factors[i].grad.item() == pytest.approx(slow_factors[i].grad.item(), rel=50 * tolerance(dtype), abs=0.05)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_square_is_bitwise_pytorchs_and_passes_nan_on(dtype):
    x = torch.randn(1000).to(dtype)
    x[3], x[4], x[5] = math.nan, math.inf, -math.inf
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = native.ReluSquare.apply(a), torch.relu(b).square()
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0)) and out.isnan().sum() == 1
    out[6:].sum().backward()
    expected[6:].sum().backward()
    close(a.grad[6:], b.grad[6:], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, C, V, padded", [(50, 16, 60, 64), (1500, 24, 128, 128), (7, 8, 3, 64)])
def test_cross_entropy_and_its_gradients(dtype, tokens, C, V, padded):
    g = torch.Generator().manual_seed(V)
    targets = torch.randint(-1, V, (tokens,), generator=g)
    fast, slow = leaves(torch.randn(tokens, C, generator=g), dtype=dtype)
    weight = (3.0 * torch.randn(padded, C, generator=g)).requires_grad_()  # large: the soft cap matters
    slow_weight = weight.detach().to(dtype).double().requires_grad_()
    found = loss.cross_entropy(fast[0], weight, targets, V, "sum")
    z = 15 * torch.tanh((slow[0] @ slow_weight[:V].T) / 15)
    expected = torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, reduction="sum")
    assert found.dtype == torch.float32 and found.item() == pytest.approx(
        expected.item(), rel=1e-5 if dtype == torch.float32 else 5e-3
    )
    (0.5 * found).backward()
    (0.5 * expected).backward()
    close(fast[0].grad, slow[0].grad, dtype, "dx")
    close(weight.grad, slow_weight.grad, dtype, "dweight")
    assert not weight.grad[V:].any(), "padded rows must get no gradient"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_c_and_pytorch_cross_entropy_agree(dtype):
    raw = (20 * torch.randn(33, 77)).to(dtype)
    targets = torch.randint(-1, 77, (33,))
    mine = raw.clone()
    losses = torch.empty(len(raw))
    native.cross_entropy_rows(mine, targets, loss.SOFTCAP, losses, want_grad=True)
    expected_grad = raw.detach().float().requires_grad_()
    z = 15 * torch.tanh(expected_grad / 15)
    expected = torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, atol=2e-5, rtol=2e-5)
    close(mine, expected_grad.grad, dtype)


@needs_native
def test_results_do_not_depend_on_threads_or_on_what_runs_beside():
    x, y = torch.randn(1000, 48), torch.randn(1000, 48)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        a, b, r, l = (t.clone().requires_grad_() for t in (x, y, torch.tensor(1.1), torch.tensor(0.3)))
        s, n = ops.mix_norm(a, b, r, l)
        (s.sum() + (n * n * n).sum()).backward()
        results.append((s, n, a.grad, b.grad, r.grad, l.grad))
    torch.set_num_threads(1)
    assert all(torch.equal(p, q) for other in results[1:] for p, q in zip(results[0], other, strict=True))


def test_without_a_compiler_pytorch_takes_over_and_says_so(tmp_path):
    code = "from nanochat_model.native import native_status; print(native_status())"
    environment = {**os.environ, "CC": "", "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "pytorch"
    assert "no C compiler found" in done.stderr and "half as fast" in done.stderr


def test_backend_choice_is_checked_and_refuses_what_cannot_run():
    cpu = torch.device("cpu")
    assert attention_backends.choose_backend("auto", cpu, torch.bfloat16, windowed=True).name == "blocked"
    assert attention_backends.choose_backend("sdpa", cpu, torch.float32, windowed=True).kernel is attention.sdpa
    with pytest.raises(ConfigError, match="fa3: needs an NVIDIA Hopper GPU"):
        attention_backends.choose_backend("fa3", cpu, torch.bfloat16, windowed=True)
    with pytest.raises(ConfigError, match="'fast' is not known"):
        attention_backends.choose_backend("fast", cpu, torch.bfloat16, windowed=True)


def test_the_choice_is_one_line_with_what_a_fallback_costs(monkeypatch, capsys):
    monkeypatch.setattr(attention_backends, "check_against_sdpa", lambda *args: None)
    choose = attention_backends._choose.__wrapped__
    monkeypatch.setitem(attention_backends.KERNELS, "flex", lambda *args: attention.sdpa)
    assert choose("auto", "cuda", torch.bfloat16, True).name == "flex"
    line = capsys.readouterr().err
    assert line.startswith(f"attention: flex ({attention_backends.FALLBACK_COST['flex']}; not used: f") and line.count("\n") == 1
    for name in ("fa3", "flash_attn"):
        monkeypatch.setitem(attention_backends.KERNELS, name, lambda *args: attention.sdpa)
    assert choose("auto", "cuda", torch.bfloat16, True).name in ("fa3", "flash_attn")
    assert "(" not in capsys.readouterr().err.removeprefix("attention: ")


@pytest.mark.parametrize("kernel", [attention.blocked, attention.sdpa])
def test_start_up_check_passes_right_kernels(kernel):
    attention_backends.check_against_sdpa(kernel, "cpu", torch.float32)


@pytest.mark.parametrize("wrong", ["no window", "wrong scale", "window one short"])
def test_start_up_check_finds_wrong_kernels(wrong):
    def kernel(q, k, v, window):
        change = {"no window": (q, 10_000), "wrong scale": (q * 1.05, window), "window one short": (q, window - 1)}[wrong]
        return attention.sdpa(change[0], k, v, change[1])

    with pytest.raises(attention_backends._Unfit, match="differs from SDPA's"):
        attention_backends.check_against_sdpa(kernel, "cpu", torch.float32)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_fp8_product_and_gradients_are_near_the_exact_ones(recipe):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=g).bfloat16().requires_grad_()
    w = (torch.randn(256, 128, generator=g) * 0.1).requires_grad_()
    x.data[3] *= 50  # an outlier row: rowwise keeps the others exact
    pair = (torch.float8_e4m3fn, torch.float8_e5m2)
    out = fp8.LINEAR[recipe].apply(x, w, pair)
    grad = torch.randn(64, 256, generator=g).bfloat16()
    out.backward(grad)
    xd, wd, gd = x.detach().double(), w.detach().double(), grad.double()
    for name, found, expected in (("out", out, xd @ wd.T), ("dx", x.grad, gd @ wd), ("dw", w.grad, gd.T @ xd)):
        error = (found.double() - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.08, f"{name}: {error}"


def test_fp8_scale_uses_the_whole_range_and_survives_zeros():
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    q, inverse = fp8.quantize(x, torch.float8_e4m3fn, None)
    assert q.float().abs().max() == 448 and torch.equal(q.float() * inverse, x)
    q, inverse = fp8.quantize(x, torch.float8_e4m3fnuz, 1)
    assert q.float().abs().max() == 240 and torch.equal(q.float() * inverse, x)


def test_fp8_is_refused_on_a_cpu_and_small_layers_stay_out():
    with pytest.raises(ConfigError, match="fp8 needs"):
        fp8.fp8_linear(torch.zeros(4, 128), torch.zeros(128, 128), "tensorwise")
    assert fp8.eligible(768, 3072) and not fp8.eligible(64, 256) and not fp8.eligible(136, 136)
