"""The model against the slow reference: logits, loss and every gradient; counts; initial weights; determinism."""

from __future__ import annotations

import math

import pytest
import reference_model as ref
import torch

from nanochat_model.config import GPTConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.interop import config_from_nanochat
from nanochat_model.native import build

torch.set_num_threads(1)

CONFIGS = {
    "two layers": ref.model_config(depth=2, dim=32, heads=2, kv_heads=2, T=20, vocab=70, pattern="SSSL"),
    "windows and grouped keys": ref.model_config(depth=3, dim=48, heads=6, kv_heads=2, T=140, vocab=64, pattern="SL"),
    "one layer, one kv head": ref.model_config(depth=1, dim=32, heads=4, kv_heads=1, T=9, vocab=130, pattern="L"),
}


@pytest.fixture(params=["native", "pytorch"])
def kernels(request, monkeypatch):
    """Both ways a CPU can compute: the C kernels and pure PyTorch."""
    build.kernels.cache_clear()
    if request.param == "pytorch":
        monkeypatch.setenv(build.SWITCH, "0")
    elif build.kernels() is None:
        pytest.skip("no C compiler here")
    yield request.param
    build.kernels.cache_clear()


def both(name, dtype=torch.float32):
    config = CONFIGS[name]
    weights = ref.random_weights(config)
    model = GPT(config_from_nanochat(config), compute_dtype=dtype)
    model.load_state_dict(weights)
    g = torch.Generator().manual_seed(1)
    idx = torch.randint(0, config["vocab_size"], (2, config["sequence_len"]), generator=g)
    targets = torch.randint(0, config["vocab_size"], idx.shape, generator=g)
    targets[0, 3] = targets[1, -1] = -1
    slow = {n: w.double().requires_grad_() for n, w in weights.items()}
    return model, config, slow, idx, targets


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_in_float32(name, kernels):
    model, config, slow, idx, targets = both(name)
    expected = ref.logits(slow, config, idx)
    assert (model(idx) - expected).abs().max() < 2e-5
    loss = ref.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss.backward()
    found = model.loss(idx, targets, reduction="sum")
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for n, p in model.named_parameters():
        if n == "backout_lambda" and config["n_layer"] <= 2:
            continue  # the kept stream is the last one: the final norm undoes any factor, so the gradient is 0 up to rounding
        expected_grad = slow[n].grad
        assert (p.grad - expected_grad).norm() <= 2e-4 * expected_grad.norm() + 1e-7, n


@pytest.mark.parametrize("name", ["windows and grouped keys", "two layers"])
def test_bf16_stays_near_the_reference(name, kernels):
    model, config, slow, idx, targets = both(name, torch.bfloat16)
    expected = ref.logits(slow, config, idx)
    loss = ref.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss.backward()
    found = model.loss(idx, targets, reduction="sum")
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=2e-2)
    for n, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        if p.ndim == 2 and n != "smear_gate.weight":  # the few scalars sum over all positions and are noisy in bf16
            expected_grad = slow[n].grad
            assert (p.grad - expected_grad).norm() <= 0.1 * expected_grad.norm(), n


def test_reductions_agree_and_ignored_targets_count_nothing(kernels):
    model, _, _, idx, targets = both("two layers")
    each = model.loss(idx, targets, reduction="none")
    assert each.shape == targets.shape and (each[targets == -1] == 0).all()
    assert model.loss(idx, targets, reduction="sum").item() == pytest.approx(each.sum().item(), rel=1e-6)
    assert model.loss(idx, targets).item() == pytest.approx(each.sum().item() / (targets >= 0).sum().item(), rel=1e-6)
    nothing = model.loss(idx, torch.full_like(targets, -1))
    nothing.backward()
    assert nothing.item() == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="median"):
        model.loss(idx, targets, reduction="median")


def test_a_position_depends_on_nothing_after_it():
    model, _, _, idx, _ = both("windows and grouped keys")
    changed = idx.clone()
    changed[:, 100:] = (changed[:, 100:] + 1) % 64
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :100], after[:, :100])
    assert (before[:, 100:] - after[:, 100:]).abs().amax(-1).min() > 1e-4


def test_longer_than_trained_is_allowed_up_to_the_tables_only():
    model, config, _, _, _ = both("two layers")
    assert model.max_tokens == 10 * config["sequence_len"]
    assert model(torch.zeros(1, 200, dtype=torch.int64)).shape == (1, 200, 70)
    with pytest.raises(ConfigError, match="201 tokens exceed the model's 200"):
        model(torch.zeros(1, 201, dtype=torch.int64))


@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_training_path_traces_as_one_graph_and_only_once(attention):
    """What torch.compile is given: no breaks, and no second compilation when weights and data change."""
    config = config_from_nanochat(CONFIGS["windows and grouped keys"])
    model = GPT(config, attention=attention)
    model.load_state_dict(ref.random_weights(CONFIGS["windows and grouped keys"]))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.choose_attention(torch.device("cpu"))
    traced = torch.compile(model.features, dynamic=False, fullgraph=True, backend=count)
    for seed in range(3):
        idx = torch.randint(0, 64, (2, 140), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(traced(idx), model.features(idx), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            model.resid_lambdas += 0.01
    assert len(graphs) == 1


def test_counts_match_the_built_model_to_the_unit():
    for depth in (1, 2, 3, 6, 7):
        for heads, kv in ((4, 4), (4, 2), (6, 1)):
            config = GPTConfig(depth=depth, model_dim=96, num_heads=heads, num_kv_heads=kv, sequence_len=64, vocab_size=1000)
            with torch.device("meta"):
                model = GPT(config)
            sizes = {n: p.numel() for n, p in model.named_parameters()}
            counts = count_params(config)
            assert counts.wte == sizes["transformer.wte.weight"]
            assert counts.lm_head == sizes["lm_head.weight"]
            assert counts.value_embeds == sum(v for n, v in sizes.items() if n.startswith("value_embeds."))
            assert counts.transformer_matrices == sum(v for n, v in sizes.items() if n.startswith("transformer.h."))
            assert counts.total == sum(sizes.values())
            matmul = sum(v for n, v in sizes.items() if n.startswith(("transformer.h.", "lm_head", "smear_gate")))
            windows = [min(block.attn.window, 64) for block in model.blocks]
            assert flops_per_token(config) == 6 * matmul + sum(12 * 96 * w for w in windows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_of_any_length_layout_and_width(dtype, kernels):
    """One token, one row, more than a training row, columns of another tensor, four bytes an id: always what the reference says."""
    model, config, slow, _, _ = both("one layer, one kv head", dtype)
    near = 2e-5 if dtype == torch.float32 else 0.3
    wide = torch.randint(0, config["vocab_size"], (9 * config["sequence_len"], 2), generator=torch.Generator().manual_seed(2))
    expected = ref.logits(slow, config, wide.T)
    for found in (model(wide.T), model(wide.T.int()), model(wide.T.contiguous())):
        assert found.shape == expected.shape and (found - expected).abs().max() < near
    for T in (1, 2):
        assert (model(wide.T[:1, :T]) - expected[:1, :T]).abs().max() < near
    total = [model.loss(x, y, "sum") for x, y in ((wide.T, wide.T.roll(-1, 1)), (wide.T.int(), wide.T.roll(-1, 1).int()))]
    assert torch.equal(*total)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 130]]), r"ids 1..130 leave the vocabulary 0..129"),
        (torch.tensor([[3, -1]]), r"ids -1..3 leave the vocabulary 0..129"),
        (torch.tensor([1, 2]), r"ids are \(2,\) of torch.int64; give a tensor of whole numbers of shape"),
        (torch.tensor([[1.0, 2.0]]), "ids are .*float32"),
        ([[1, 2]], "ids are list"),
        (torch.zeros(1, 91, dtype=torch.int64), "91 tokens exceed the model's 90 positions"),
    ],
)
def test_ids_that_no_table_has_are_named(ids, message):
    model = GPT(config_from_nanochat(CONFIGS["one layer, one kv head"])).init_weights(0)
    with pytest.raises(ConfigError, match=message):
        model(ids)
    if isinstance(ids, torch.Tensor) and ids.shape != (1, 91):
        with pytest.raises(ConfigError, match=message):
            model.loss(ids, ids)


def test_d24_has_the_published_size_when_built():
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(24))
    assert sum(p.numel() for p in model.parameters()) == 1_384_122_122


def test_initial_weights_have_their_distributions():
    config = GPTConfig(depth=4, model_dim=128, num_heads=2, num_kv_heads=2, sequence_len=64, vocab_size=4096)
    w = dict(GPT(config).init_weights(0).named_parameters())
    bound = math.sqrt(3 / 128)
    assert w["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.02)
    assert w["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.02)
    for name, top in (("attn.c_q", bound), ("attn.c_k", bound), ("attn.c_v", bound), ("mlp.c_fc", 0.4 * bound)):
        p = w[f"transformer.h.1.{name}.weight"]
        assert p.abs().max() <= top and p.std().item() == pytest.approx(top / math.sqrt(3), rel=0.03)
    assert w["value_embeds.3.weight"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not w["transformer.h.2.attn.c_proj.weight"].any() and not w["transformer.h.2.mlp.c_proj.weight"].any()
    for name in ("smear_gate.weight", "transformer.h.3.attn.ve_gate.weight"):
        assert w[name].min() >= 0 and w[name].max() <= 0.02 and w[name].std() > 0
    assert w["resid_lambdas"].tolist() == pytest.approx([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05])
    assert w["x0_lambdas"].tolist() == pytest.approx([0.20, 0.15, 0.10, 0.05])
    assert w["smear_lambda"].item() == 0 and w["backout_lambda"].item() == pytest.approx(0.2)


def test_initial_weights_depend_on_seed_and_name_only():
    small = GPTConfig(depth=2, model_dim=32, num_heads=2, num_kv_heads=2, sequence_len=64, vocab_size=64)
    deeper = GPTConfig(depth=4, model_dim=32, num_heads=2, num_kv_heads=2, sequence_len=64, vocab_size=64)
    torch.manual_seed(123)  # the global generator must not matter
    a, b, c = (dict(GPT(x).init_weights(s).named_parameters()) for x, s in ((small, 7), (deeper, 7), (small, 8)))
    assert torch.equal(a["transformer.h.1.attn.c_q.weight"], b["transformer.h.1.attn.c_q.weight"])
    assert not torch.equal(a["transformer.h.1.attn.c_q.weight"], c["transformer.h.1.attn.c_q.weight"])
    assert not torch.equal(a["transformer.h.0.attn.c_q.weight"], a["transformer.h.0.attn.c_k.weight"])


def test_unknown_fp8_recipe_is_refused():
    with pytest.raises(ConfigError, match="columnwise"):
        GPT(GPTConfig(model_dim=64, num_heads=2, num_kv_heads=2), fp8="columnwise")
