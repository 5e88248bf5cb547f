"""Generation with the cache against the model without one."""

from __future__ import annotations

import pytest
import reference_model as ref
import torch

from nanochat_model.engine import KVCache, generate, sample
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.interop import config_from_nanochat

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


def test_sample_follows_the_distribution_and_top_k():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20_000, 4)
    g = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, 0), (2.0, 0), (0.7, 2)):
        found = torch.bincount(sample(logits, temperature, top_k, g), minlength=4) / len(logits)
        scaled = logits[0] / temperature
        if top_k:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
        assert (found - torch.softmax(scaled, 0)).abs().max() < 0.012
    assert (sample(logits, 0.0, 0, g) == 2).all()


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
    ],
)
def test_bad_requests_are_named(model, prompts, arguments, message):
    with pytest.raises(ConfigError, match=message):
        next(generate(model, prompts, **{"max_tokens": 4, **arguments}))
