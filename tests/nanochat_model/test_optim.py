"""The optimizer against slow references: AdamW against torch.optim, Muon step by step against a matrix-by-matrix SVD version."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat_model.config import GPTConfig, OptimizerConfig
from nanochat_model.gpt import GPT
from nanochat_model.native import kernels
from nanochat_model.native import muon as native_muon
from nanochat_model.optim import build_optimizer, muon
from nanochat_model.optim.groups import parameter_groups

torch.set_num_threads(1)
CONFIG = GPTConfig(depth=3, model_dim=48, num_heads=4, num_kv_heads=2, sequence_len=16, vocab_size=70)
POLAR_BOUND = 0.15  # singular values down to 1/200 of the norm end within this of 1 after 5 steps with these coefficients


def model_and_optimizer(**changes):
    model = GPT(CONFIG).init_weights(0)
    return model, build_optimizer(model, OptimizerConfig(**changes))


def random_gradients(model, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters()}


def give(model, gradients):
    for n, p in model.named_parameters():
        p.grad.add_(gradients[n])  # as backward does


@pytest.mark.parametrize("shape", [(24, 24), (60, 20), (20, 60), (4, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_express_gives_the_svds_orthogonal_factor(shape, dtype):
    g = torch.Generator().manual_seed(shape[0])
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape, generator=g, dtype=torch.float64), full_matrices=False)
    singular = torch.logspace(-2, 0, u.shape[-1], dtype=torch.float64)
    x = u @ torch.diag(singular / singular.norm() / 1.01) @ vt
    found = muon.orthogonalize(x.to(dtype), 5).double()
    values = singular / singular.norm() / 1.01
    for c1, c3, c5 in muon.POLAR_EXPRESS:  # the same polynomials on the singular values alone
        values = c1 * values + c3 * values**3 + c5 * values**5
    assert (values - 1).abs().max() < POLAR_BOUND
    error = (found - u @ torch.diag(values) @ vt).norm() / found.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.08)
    assert (torch.linalg.svdvals(found) - 1).abs().max() < POLAR_BOUND + (1e-4 if dtype == torch.float32 else 0.2)


def test_equilibrate_gives_every_row_the_mean_norm():
    x = torch.randn(2, 5, 9) * torch.tensor([1.0, 10, 0.1, 3, 0]).view(1, 5, 1)
    out = muon.equilibrate(x)
    norms = out.norm(dim=-1)
    assert torch.allclose(norms[:, :4], norms[:, :1].expand(2, 4), rtol=1e-5) and (norms[:, 4] == 0).all()
    assert ((out.norm(dim=(-2, -1)) - 1 / 1.01).abs() < 1e-4).all()
    torch.testing.assert_close(out[0, 1] / out[0, 1].norm(), x[0, 1] / x[0, 1].norm())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_variance_reduction_row_by_row(shape):
    m, n = shape
    u, second = torch.randn(1, m, n), torch.rand(1, m, 1) if m >= n else torch.rand(1, 1, n)
    before = second.clone()
    found = muon.reduce_variance(u.clone(), second, 0.9)[0]

    snapped = u[0] * math.sqrt(min(m, n)) / u[0].norm()
    lines = list(snapped) if m >= n else list(snapped.T)  # rows of tall and square, columns of wide matrices
    scaled = []
    for i, line in enumerate(lines):
        state = 0.9 * before.flatten()[i] + 0.1 * (line**2).mean()
        assert second.flatten()[i].item() == pytest.approx(state.item(), rel=1e-5)
        scaled.append(line / math.sqrt(state))
    expected = torch.stack(scaled) if m >= n else torch.stack(scaled).T
    expected = expected * snapped.norm() / expected.norm()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_cautious_decay_only_where_update_and_weight_agree():
    weight = torch.tensor([[[1.0, -1.0, 2.0, 0.0]]])
    update = torch.tensor([[[0.5, 0.5, -0.25, 1.0]]])
    muon.cautious_update(weight, update, 0.1, 0.4)
    # decay pulls 1.0 only: there the step -lr·update shrinks the weight anyway
    torch.testing.assert_close(weight, torch.tensor([[[1.0 - 0.05 - 0.04, -1.05, 2.025, -0.1]]]))


def reference_muon(weights, gradient_steps, *, lr, decay, momentum, beta2):
    """One matrix through several steps with an exact SVD in place of Polar Express."""
    w = weights.double().clone()
    m, n = w.shape
    buffer, second = torch.zeros_like(w), torch.zeros(m if m >= n else n, dtype=torch.float64)
    for g in gradient_steps:
        g = g.double()
        buffer = momentum * buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * buffer
        rows = update.norm(dim=1, keepdim=True)
        update = update / rows * (rows**2).mean().sqrt()
        u, _, vt = torch.linalg.svd(update, full_matrices=False)
        o = u @ vt
        mean_square = (o**2).mean(dim=1 if m >= n else 0)
        second = beta2 * second + (1 - beta2) * mean_square
        scaled = o / second.sqrt()[:, None] if m >= n else o / second.sqrt()
        o = scaled * o.norm() / scaled.norm()
        rate = lr * math.sqrt(max(1, m / n))
        w = w - rate * o - rate * decay * w * ((o * w) >= 0)
    return w


def test_three_muon_steps_follow_the_svd_version():
    model, optimizer = model_and_optimizer(weight_decay=0.3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = [random_gradients(model, s) for s in range(3)]
    for gradients in steps:
        give(model, gradients)
        optimizer.step(0.5, 0.9, 0.7)
        optimizer.zero_grad()
    checked = 0
    for n, p in model.named_parameters():
        if n.startswith("transformer.h."):
            start = before[n]
            expected = reference_muon(start, [g[n] for g in steps], lr=0.01, decay=0.21, momentum=0.9, beta2=0.9)
            moved, error = (expected - start).norm(), (p - expected).norm()
            assert error < 0.12 * moved, f"{n}: {error / moved:.3f}"  # Polar Express is not an exact SVD
            checked += 1
    assert checked == 3 * 6 + 2


@pytest.mark.skipif(not hasattr(kernels(), "muon_step"), reason="no AVX512-BF16 here")
@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48), (4, 12), (17, 23), (23, 17)])
def test_muon_in_c_is_as_near_to_float64_as_pytorchs(shape):
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    start = [torch.randn(2, m, n, generator=generator), torch.zeros(2, m, n), torch.zeros((2, m, 1) if m >= n else (2, 1, n))]
    exact, plain, in_c = [t.double() for t in start], [t.clone() for t in start], [t.clone() for t in start]
    for step in range(3):
        gradient = torch.randn(2, m, n, generator=generator)
        values = {"momentum": 0.9 + 0.01 * step, "lr": 0.02, "weight_decay": 0.3, "beta2": 0.9}
        native_muon.muon_step(in_c[0], gradient, *in_c[1:], **values, coefficients=muon.POLAR_EXPRESS)
        muon.muon_step(plain[0], gradient, *plain[1:], **values, polar_steps=5, dtype=torch.bfloat16)
        muon.muon_step(exact[0], gradient.double(), *exact[1:], **values, polar_steps=5, dtype=torch.float64)

    def error(found, part):
        moved = exact[part] - start[part]
        return (found[part].double() - start[part] - moved).norm() / moved.norm()

    for part in range(3):  # values, momentum, second moments
        assert error(in_c, part) < max(1.1 * error(plain, part), 1e-6)


def test_adamw_groups_are_torchs_adamw():
    model, optimizer = model_and_optimizer()
    config = OptimizerConfig()
    table = (48 / 768) ** -0.5
    settings = {
        "lm_head.weight": (config.unembedding_lr * table, config.unembedding_betas, 0.01),
        "transformer.wte.weight": (config.embedding_lr * table, config.embedding_betas, 0.001),
        "value_embeds.0.weight": (config.embedding_lr * table / 2, config.embedding_betas, 0.01),
        "value_embeds.2.weight": (config.embedding_lr * table / 2, config.embedding_betas, 0.01),
        "resid_lambdas": (0.5 * 0.01, (0.8, 0.95), 0.05),
        "x0_lambdas": (0.5, (0.96, 0.95), 0.0),
        "smear_gate.weight": (0.2, (0.8, 0.95), 0.0),
        "smear_lambda": (0.2, (0.8, 0.95), 0.0),
        "backout_lambda": (0.2, (0.8, 0.95), 0.0),
    }
    twins = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n in settings}
    reference = torch.optim.AdamW(
        [{"params": [twins[n]], "lr": lr, "betas": b, "weight_decay": wd, "eps": 1e-10} for n, (lr, b, wd) in settings.items()]
    )
    rates = [g["lr"] for g in reference.param_groups]
    for step, multiplier in enumerate((0.1, 1.0, 0.6, 0.05)):
        gradients = random_gradients(model, step)
        give(model, gradients)
        for n, twin in twins.items():
            twin.grad = gradients[n]
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rate * multiplier
        reference.step()
        optimizer.step(multiplier, 0.9, 1.0)
        optimizer.zero_grad()
    for n, twin in twins.items():
        torch.testing.assert_close(dict(model.named_parameters())[n], twin, atol=1e-6, rtol=1e-5)


def test_scheduled_values_as_tensors_compile_once():
    """On GPUs the update is compiled; a multiplier that moves must not compile it again."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(muon.muon_step, dynamic=False, fullgraph=True, backend=count)
    plain, traced = ([torch.ones(3, 8, 20), torch.zeros(3, 8, 20), torch.zeros(3, 1, 20)] for _ in range(2))
    for step in range(4):
        gradient = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(step))
        values = {"momentum": 0.85 + 0.01 * step, "lr": 0.02 / (step + 1), "weight_decay": 0.3 - 0.1 * step}
        fixed = {"beta2": 0.9, "polar_steps": 5, "dtype": torch.float32}
        muon.muon_step(plain[0], gradient, *plain[1:], **values, **fixed)
        compiled(traced[0], gradient, *traced[1:], **{k: torch.tensor(v) for k, v in values.items()}, **fixed)
    assert len(graphs) == 1
    torch.testing.assert_close(traced, plain, atol=1e-5, rtol=1e-4)


def test_every_parameter_is_in_one_group_with_its_rate():
    groups = parameter_groups(GPT(CONFIG).named_parameters(), 48, OptimizerConfig(matrix_lr=0.02))
    names = [n for g in groups for n in g.names]
    assert len(names) == len(set(names)) == len(list(GPT(CONFIG).named_parameters()))
    rates = {g.shape: g.lr for g in groups if g.kind == "muon"}
    assert rates == {(2, 12): 0.02, (24, 48): 0.02, (48, 48): 0.02, (48, 192): 0.02, (192, 48): pytest.approx(0.04)}


def test_state_survives_saving_both_ways_to_the_bit():
    model, optimizer = model_and_optimizer()
    for s in range(2):
        give(model, random_gradients(model, s))
        optimizer.step(1.0, 0.9, 1.0)
        optimizer.zero_grad()
    for kind in ("local", "consolidated"):
        other, fresh = model_and_optimizer()
        other.load_state_dict(model.state_dict())
        if kind == "local":
            fresh.load_state_dict(optimizer.state_dict())
        else:
            fresh.load_consolidated(optimizer.consolidated_state())
        twin, twin_optimizer = model_and_optimizer()
        twin.load_state_dict(model.state_dict())
        twin_optimizer.load_state_dict(optimizer.state_dict())
        for m, o in ((other, fresh), (twin, twin_optimizer)):
            give(m, random_gradients(m, 9))
            o.step(0.5, 0.95, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), twin.parameters(), strict=True)), kind
        assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_consolidated_state_names_every_parameter_in_its_shape():
    model, optimizer = model_and_optimizer()
    give(model, random_gradients(model, 0))
    optimizer.step(1.0, 0.9, 1.0)
    state = optimizer.consolidated_state()
    parameters = dict(model.named_parameters())
    assert set(state["params"]) == set(parameters) and state["num_steps"] == 1
    for n, s in state["params"].items():
        key = "momentum" if n.startswith("transformer.h.") else "exp_avg"
        assert s[key].shape == parameters[n].shape and s[key].any()


def test_state_of_another_rank_is_refused():
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match="rank 1 of 2"):
        optimizer.load_state_dict({**optimizer.state_dict(), "world_size": 2, "rank": 1})


def test_a_gradient_that_somebody_replaced_still_counts():
    (model, optimizer), (twin, twin_optimizer) = model_and_optimizer(), model_and_optimizer()
    gradients = random_gradients(model, 0)
    give(model, gradients)
    for n, p in twin.named_parameters():
        p.grad = gradients[n].clone()
    optimizer.step(1.0, 0.9, 1.0)
    twin_optimizer.step(1.0, 0.9, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_training_in_bf16_keeps_float32_masters_and_learns():
    model = GPT(CONFIG, compute_dtype=torch.bfloat16).init_weights(0)
    optimizer = build_optimizer(model, OptimizerConfig())
    idx = torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(12):
        loss = model.loss(idx, idx.roll(-1, 1))
        loss.backward()
        optimizer.step(1.0, 0.9, 1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0] == pytest.approx(math.log(70), abs=0.05) and losses[-1] < 0.5 * losses[0]
