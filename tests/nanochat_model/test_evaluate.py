import math

import numpy as np
import pytest
import torch
from tiny_run import SEQUENCE_LEN, tiny_config, tiny_shards

from nanochat_model import evaluate
from nanochat_model.chat import sample_texts
from nanochat_model.errors import ConfigError
from nanochat_model.evaluate import evaluate_bpb, evaluate_loss
from nanochat_model.gpt import GPT
from nanochat_model.loader import Loader


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(tiny_config().model).init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))  # so that losses differ by token
    return model


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    loader = Loader(tiny_shards(), packing="keep_remainder", sequence_len=SEQUENCE_LEN, rows_per_batch=1)
    return loader.validation(30 * SEQUENCE_LEN)


def slow_bpb(model: GPT, rows: tuple[np.ndarray, np.ndarray], token_bytes: np.ndarray) -> float:
    """One token at a time, in Python floats."""
    nats = num_bytes = 0.0
    for x, y in zip(*rows, strict=True):
        logits = model(torch.tensor(x)[None])[0].double()
        for t, target in enumerate(y.tolist()):
            if target >= 0 and token_bytes[target] > 0:
                nats += float(torch.logsumexp(logits[t], 0) - logits[t, target])
                num_bytes += int(token_bytes[target])
    return nats / (math.log(2) * num_bytes)


@torch.no_grad()
def test_agrees_with_one_token_at_a_time(model: GPT, rows: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, targets = rows[0][:6], rows[1][:6].copy()
    targets[0, :5] = -1
    assert (tiny_shards().token_bytes[targets] == 0).any(), "special tokens must be among the targets for this test to bite"
    expected = slow_bpb(model, (inputs, targets), tiny_shards().token_bytes)
    assert evaluate_bpb(model, (inputs, targets), tiny_shards().token_bytes) == pytest.approx(expected, rel=1e-5)


def test_chunks_do_not_move_the_result(model: GPT, rows: tuple[np.ndarray, np.ndarray]) -> None:
    whole = evaluate_bpb(model, rows, tiny_shards().token_bytes, len(rows[0]))
    for chunk in (1, 4, 7):
        assert evaluate_bpb(model, rows, tiny_shards().token_bytes, chunk) == pytest.approx(whole, rel=1e-6)


def test_what_memory_does_not_hold_is_evaluated_by_halves(
    model: GPT, rows: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the evaluation that a fine-tuning begins with, before any micro-batch could be halved."""
    real, asked, limit = GPT.loss, [], 2

    def loss(self: GPT, inputs: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        asked.append(len(inputs))
        if len(inputs) > limit:
            raise torch.OutOfMemoryError("this device holds two rows")
        return real(self, inputs, *args, **kwargs)  # type: ignore[arg-type]

    expected = evaluate_loss(model, rows, 7)
    monkeypatch.setattr(GPT, "loss", loss)
    assert evaluate_loss(model, rows, 7) == pytest.approx(expected, rel=1e-6)
    assert asked[:6] == [7, 3, 1, 1, 1, 1] and asked.count(7) == 1, "what does not fit is tried once"
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate_loss(model, rows, 7)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_ranks_add_up_to_the_bit(
    model: GPT, rows: tuple[np.ndarray, np.ndarray], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's chunk sums, added as the all-reduce would: the very float of one process."""
    monkeypatch.setitem(evaluate.CHUNK_TOKENS, "cpu", 4 * SEQUENCE_LEN)
    alone = evaluate_bpb(model, rows, tiny_shards().token_bytes)
    parts: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        mine: list[torch.Tensor] = []
        parts.append(mine)
        monkeypatch.setattr(evaluate, "current_ranks", lambda r=rank: evaluate_ranks(r, world_size))
        monkeypatch.setattr(evaluate, "all_sum", lambda v, m=mine: m.append(v.cpu().double()) or v.cpu().double())
        evaluate_bpb(model, rows, tiny_shards().token_bytes)
    counts, nats = (sum(p[i] for p in parts[1:]) + parts[0][i] for i in (0, 1))
    assert math.fsum(nats.tolist()) / (math.log(2) * counts[:, 0].sum().item()) == alone


def evaluate_ranks(rank: int, world_size: int):
    from nanochat_model.distributed import Ranks

    return Ranks(rank=rank, world_size=world_size)


def test_training_mode_is_given_back(model: GPT, rows: tuple[np.ndarray, np.ndarray]) -> None:
    for training in (False, True):
        evaluate_loss(model.train(training), rows)
        assert model.training is training


def test_fp8_is_for_training_alone() -> None:
    """No CPU has fp8: a layer that would use it raises, so evaluation, CORE's logits and generation do not."""
    model = GPT(tiny_config(model__model_dim=128, model__num_heads=4).model, fp8="tensorwise").init_weights(0)
    ids = torch.zeros(1, SEQUENCE_LEN, dtype=torch.int64)
    with pytest.raises(ConfigError, match="fp8 needs"):
        model.train().features(ids)
    assert evaluate_loss(model, (ids.numpy(), ids.numpy())) > 0 and sample_texts(model, tiny_shards().tokenizer)
    assert model.training and torch.isfinite(model.eval()(ids)).all()


def test_nothing_to_evaluate_is_an_error(model: GPT, rows: tuple[np.ndarray, np.ndarray]) -> None:
    empty = (rows[0], np.full_like(rows[1], -1))
    with pytest.raises(ValueError, match="no target"):
        evaluate_bpb(model, empty, tiny_shards().token_bytes)
    with pytest.raises(ValueError, match="no target"):
        evaluate_loss(model, empty)


def test_on_a_cpu_the_compiled_path_is_left_alone(model: GPT, rows: tuple[np.ndarray, np.ndarray]) -> None:
    expected = evaluate_bpb(model, rows, tiny_shards().token_bytes)

    def compiled(idx: torch.Tensor) -> torch.Tensor:
        raise AssertionError("evaluation would compile")

    model.features = compiled  # type: ignore[method-assign]
    try:
        assert evaluate_bpb(model, rows, tiny_shards().token_bytes) == expected
        assert model.features is compiled
    finally:
        del model.features
