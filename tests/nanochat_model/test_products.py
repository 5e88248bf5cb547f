"""The products of linear layers and whole sublayers against obvious ones, in C and PyTorch, float32 and bf16."""

from __future__ import annotations

import contextlib

import pytest
import torch
from closeness import DTYPES, close, needs_native, tolerance

from nanochat_model import gpt
from nanochat_model.native import block, build, cross_entropy, products
from nanochat_model.native import ops as native

torch.set_num_threads(1)

PRODUCT_CASES = [  # tokens, outputs of the stacked weights, inputs
    (2048, (64,), 64),
    (37, (8, 16, 24), 40),  # no multiple of a tile or a strip anywhere
    (1031, (136,), 72),
    (9, (48,), 200),
    (5, (16,), 16),  # too few tokens for C
    (300, (20, 20), 6),  # sizes that C does not take
]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, outputs, inputs", PRODUCT_CASES)
def test_products_of_linear_layers(dtype, tokens, outputs, inputs):
    torch.manual_seed(0)
    weights = [torch.randn(n, inputs) for n in outputs]
    joint = torch.cat(weights).to(dtype).double()
    x = torch.randn(tokens, inputs + 6).to(dtype)[:, :inputs]  # rows that lie apart, as views of wider ones do
    g, hidden = torch.randn(tokens, len(joint)).to(dtype), torch.randn(tokens, inputs).to(dtype)
    close(products.linear(x, weights), x.double() @ joint.T, dtype, "linear")
    close(products.linear(x, weights, plus=g), x.double() @ joint.T + g.double(), dtype, "linear with a term added")
    close(products.linear_backward(g, weights), g.double() @ joint, dtype, "its input's gradient")
    found, active = products.hidden_and_square(x, weights[0])
    expected = (x.double() @ joint.T)[:, : outputs[0]]
    close(found, expected, dtype, "hidden")
    close(active, expected.relu().square(), dtype, "relu²")
    close(
        products.hidden_backward(g, torch.cat(weights), hidden),
        2 * hidden.double().relu() * (g.double() @ joint),
        dtype,
        "relu² back",
    )
    for square in (False, True):
        total = torch.ones(len(joint), inputs)
        products.accumulate_gradient(total, g, x, square=square)
        close(total - 1, g.double().T @ (x.double().relu().square() if square else x.double()), dtype, f"gradient, square {square}")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_gradients_of_weights_that_read_the_same_input(dtype, order):
    """In one piece where they lie one after the other, and apart otherwise: the same sums."""
    torch.manual_seed(0)
    x, g, held = torch.randn(40, 24).to(dtype), torch.randn(40, 48).to(dtype), torch.ones(3, 16, 24)
    weights = [torch.nn.Parameter(torch.randn(16, 24)) for _ in order]
    for w, at in zip(weights, order, strict=True):
        w.grad = held[at]
    assert (products._one_matrix([w.grad for w in weights]) is not None) == (order == (0, 1, 2))
    assert products.add_gradients(weights, g, x) == [None] * 3
    close(torch.cat([w.grad for w in weights]) - 1, g.double().T @ x.double(), dtype)


@pytest.mark.skipif(not hasattr(build.kernels(), "product_rows"), reason="no AVX512-BF16 here")
def test_packed_weights_are_kept_only_while_they_stay():
    torch.manual_seed(0)
    weight, x, g = torch.randn(16, 8), torch.randn(8, 8).bfloat16(), torch.randn(8, 16).bfloat16()
    with products.weights_stay():
        first = products.linear(x, [weight]), products.linear_backward(g, [weight])
        again = products.linear(x, [weight]), products.linear_backward(g, [weight])
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    weight.data.neg_()  # unseen by torch's version counter, as the optimizer's own kernels are
    with products.weights_stay():
        assert torch.equal(products.linear(x, [weight]), -first[0])
    weight.data.neg_()
    assert torch.equal(products.linear_backward(g, [weight]), first[1])


@pytest.mark.skipif(not hasattr(build.kernels(), "product_rows"), reason="no AVX512-BF16 here")
@pytest.mark.parametrize("outputs, inputs", [(96, 64), (8, 264), (264, 8), (200, 136)])
def test_products_in_c_do_not_depend_on_threads(outputs, inputs):
    """Threads divide a gradient into blocks, some of which may be empty."""
    torch.manual_seed(0)
    x, g, weight = torch.randn(700, inputs).bfloat16(), torch.randn(700, outputs).bfloat16(), torch.randn(outputs, inputs)
    results = []
    for threads in (1, 2, 3, 4, 6):
        torch.set_num_threads(threads)
        total = torch.zeros(outputs, inputs)
        products.accumulate_gradient(total, g, x)
        results.append((products.linear(x, [weight]), products.linear_backward(g, [weight]), total))
    torch.set_num_threads(1)
    assert all(torch.equal(p, q) for other in results[1:] for p, q in zip(results[0], other, strict=True))


def plain_layers(monkeypatch):
    """The same modules without a C kernel: the slow reference of the fused sublayers."""
    for module in (native, gpt.native):
        monkeypatch.setattr(module, "usable", lambda *tensors: False)


def small_model(dtype):
    """A model whose scalars and gates are not at their start, and ids and targets for it."""
    config = gpt.GPTConfig(depth=3, model_dim=64, num_heads=4, num_kv_heads=2, sequence_len=64, vocab_size=256)
    model = gpt.GPT(config, compute_dtype=dtype).init_weights(0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids, targets = torch.nn.functional.pad(torch.randint(0, 256, (2, 2, 64)), (0, 1))[..., :-1]  # slices of rows, as batches are
    return model, ids, targets


def loss_and_gradients(model, ids, targets, held=None):
    """`held`: what every gradient is at the start."""
    for p in model.parameters():
        p.grad = None if held is None else torch.full_like(p, held)
    loss = model.loss(ids, targets)
    loss.backward()
    return loss.item(), {n: p.grad - (held or 0) for n, p in model.named_parameters()}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [1.0, None])  # whether weights have gradients already, which backward then adds to
def test_sublayers_equal_plain_modules(dtype, held, monkeypatch):
    batch = small_model(dtype)
    loss, found = loss_and_gradients(*batch, held)
    plain_layers(monkeypatch)
    expected_loss, expected = loss_and_gradients(*batch, held)
    assert loss == pytest.approx(expected_loss, rel=tolerance(dtype))
    for name, g in expected.items():
        error, rounding = (found[name] - g).norm(), 2e-7 * g.numel() ** 0.5  # of adding to a gradient of 1
        assert error < (2e-5 if dtype == torch.float32 else 6e-2) * g.norm() + rounding, (name, error / g.norm())


@pytest.mark.skipif(not hasattr(build.kernels(), "product_rows"), reason="no AVX512-BF16 here")
def test_kernels_that_wait_and_run_together_give_the_same_bits(monkeypatch):
    batch = small_model(torch.bfloat16)
    loss, found = loss_and_gradients(*batch)
    with native.together():
        waiting = products.product(torch.ones(8, 8).bfloat16(), products.packed_outputs((torch.eye(8),))[0], 8)
        waiting.zero_()
        with pytest.raises(AssertionError, match="waiting kernels"):
            products.linear(torch.ones(8, 8), (torch.eye(8),))
    assert torch.equal(waiting, torch.ones(8, 8).bfloat16()), "kernels run at the end, with what they read kept until then"
    for module in (block, cross_entropy):
        monkeypatch.setattr(module, "together", contextlib.nullcontext)
    expected_loss, expected = loss_and_gradients(*batch)
    assert loss == expected_loss and all(torch.equal(g, found[name]) for name, g in expected.items())


@pytest.mark.skipif(not hasattr(build.kernels(), "product_rows"), reason="no AVX512-BF16 here")
def test_no_chunk_of_the_loss_is_too_short_for_c():
    torch.manual_seed(0)
    x, rows, targets = torch.randn(641, 16).bfloat16(), torch.randn(24, 16), torch.randint(0, 24, (641,))
    results = []
    for most in (16, 641):  # 16 tokens a chunk would leave one alone
        table = torch.zeros(24, 16)
        losses, grad_x = cross_entropy.chunked_losses(x, rows, targets, cap=15.0, most=most, grad_table=table)
        assert grad_x is not None
        results.append((losses, grad_x, table))
    (losses, grad_x, table), (expected, expected_x, expected_table) = results
    assert torch.equal(losses, expected) and torch.equal(grad_x, expected_x)
    close(table, expected_table.double(), torch.float32)
