"""Generation with the cache against the model without one."""

from __future__ import annotations

import pytest
import reference_model as ref
import torch

from nanochat_model.engine import KVCache, generate, prepare_inference
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.interop import config_from_nanochat
from nanochat_model.sampling import Sampling, choose

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    config = ref.model_config(depth=3, dim=48, heads=4, kv_heads=2, T=160, vocab=90, pattern="SSL")
    model = GPT(config_from_nanochat(config))
    model.load_state_dict(ref.random_weights(config))
    return model.eval()


PROMPTS = [[5, 6, 7, 8], [1], list(range(80)) + list(range(70))]


@torch.no_grad()
def uncached(model, prompt, num_tokens):
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_uncached_model_for_prompts_of_all_lengths(model):
    """The longest crosses the short window (128) and the trained length (160) on the way."""
    steps = list(generate(model, PROMPTS, max_tokens=20, temperature=0.0))
    assert len(steps) == 20
    for row, prompt in enumerate(PROMPTS):
        assert [s[row] for s in steps] == uncached(model, prompt, 20)


@torch.no_grad()
def test_cached_logits_equal_uncached_whatever_the_pieces(model):
    idx = torch.randint(0, 90, (2, 170), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 170, dtype=torch.float32, device=torch.device("cpu"))
    pieces = [model(part, cache) for part in idx.split([1, 30, 120, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=2e-4, rtol=1e-4)


def test_a_stopped_row_repeats_its_stop_and_all_stopped_ends(model):
    free = list(generate(model, PROMPTS[:2], max_tokens=12, temperature=0.0))
    stop = free[3][0]
    first = next(i for i, s in enumerate(free) if s[0] == stop)
    rows = list(generate(model, PROMPTS[:1], max_tokens=12, temperature=0.0, stop_ids=[stop]))
    assert [r[0] for r in rows] == [s[0] for s in free[: first + 1]]
    both = list(generate(model, PROMPTS[:2], max_tokens=12, temperature=0.0, stop_ids=[stop]))
    assert all(s[0] == stop for s in both[first:])
    other = [s[1] for s in free]
    length = other.index(stop) + 1 if stop in other else 12
    assert [s[1] for s in both][:length] == other[:length]


def test_sampling_is_seeded_and_batched(model):
    def run(seed):
        return list(generate(model, [PROMPTS[0]] * 3, max_tokens=8, temperature=1.0, top_k=20, seed=seed))

    assert run(1) == run(1) != run(2)
    assert len({tuple(s[r] for s in run(1)) for r in range(3)}) == 3, "rows of one batch are independent samples"


def cut(p, setting):
    """What a row may choose, token by token: the definition of top-k, then of top-p."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: setting.top_k] if setting.top_k else order
    mass, nucleus = 0.0, []
    for i in kept:
        if mass < setting.top_p * sum(p[j] for j in kept):
            nucleus.append(i)
        mass += p[i]
    allowed = torch.tensor([float(p[i]) if i in nucleus else 0.0 for i in range(len(p))])
    return allowed / allowed.sum()


def test_choices_follow_each_rows_own_distribution():
    """Rows of all settings in one batch, many times each."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5])
    settings = [
        Sampling(temperature=1.0), Sampling(temperature=2.0), Sampling(temperature=0.7, top_k=2), Sampling(temperature=0.0),
        Sampling(temperature=1.0, top_p=0.7), Sampling(temperature=1.3, top_k=3, top_p=0.8), Sampling(temperature=1.0, top_p=1e-6),
    ]  # fmt: skip
    n = 4000
    uniforms = torch.rand(n * len(settings), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    ids = choose(logits.expand(n * len(settings), -1), settings * n, uniforms).view(n, len(settings))
    for column, setting in enumerate(settings):
        found = torch.bincount(ids[:, column], minlength=5) / n
        if setting.temperature == 0:
            assert found[2] == 1
            continue
        expected = cut(torch.softmax(logits / setting.temperature, 0).tolist(), setting)
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().max() < 0.03


def test_the_ends_of_the_interval_choose_what_is_possible():
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]])
    assert choose(logits, [Sampling(top_k=2)], [0.0]).tolist() == [1]
    assert choose(logits, [Sampling(top_k=2)], [1.0 - 2**-53]).tolist() == [2]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-39, 1e-6])
def test_next_to_no_temperature_takes_the_likeliest_and_spoils_no_other_row(temperature):
    """Divided by so little, logits would be infinite, and the sum of their exponentials no number."""
    logits = torch.tensor([[1.0, 15.0, -3.0, 14.0], [0.0, 0.0, 0.0, 9.0]])
    settings = [Sampling(temperature=temperature, top_k=2, top_p=0.9), Sampling(temperature=1.0)]
    assert choose(logits, settings, [0.999, 0.5]).tolist() == [1, 3]
    assert choose(logits[:1], settings[:1], [0.999]).tolist() == [1]


def test_a_prepared_model_says_the_same(model):
    half = GPT(model.config, compute_dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    before = list(generate(half.eval(), PROMPTS, max_tokens=3, temperature=0.0))
    prepare_inference(half)
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.transformer["wte"].weight.dtype == torch.float32
    assert list(generate(half, PROMPTS, max_tokens=3, temperature=0.0)) == before


def test_bf16_generation_runs(model):
    half = GPT(model.config, compute_dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    assert len(list(generate(half.eval(), PROMPTS, max_tokens=3, temperature=0.0))) == 3


@pytest.mark.parametrize(
    "prompts, arguments, message",
    [
        ([], {}, "a prompt is empty"),
        ([[1], []], {}, "a prompt is empty"),
        ([[1, 90]], {}, "leave the vocabulary 0..89"),
        ([[1]], {"max_tokens": 1600}, "exceed the model's 1600 positions"),
        ([[1]], {"temperature": -1.0}, "must be 0 or more"),
        ([[1]], {"top_k": -1}, "must be 0 .all tokens. or more"),
        ([[1]], {"top_p": 0.0}, "must lie above 0"),
    ],
)
def test_bad_requests_are_named(model, prompts, arguments, message):
    with pytest.raises(ConfigError, match=message):
        next(generate(model, prompts, **{"max_tokens": 4, **arguments}))
