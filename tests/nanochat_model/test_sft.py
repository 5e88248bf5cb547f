import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from task_files import write_jsonl
from tiny_run import RUNTIME, tiny_config

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.checkpoint import (
    CHECKPOINTS_DIR,
    CheckpointState,
    checkpoint_hash,
    copy_tokenizer,
    find_latest,
    load_model,
    read_model_state,
    read_optimizer_state,
    read_state,
    save_checkpoint,
)
from nanochat_model.config import TrainConfig
from nanochat_model.conversation_set import ConversationLoader
from nanochat_model.errors import ConfigError
from nanochat_model.interop import inherited_config
from nanochat_model.loop import Batch
from nanochat_model.record import RunRecord
from nanochat_model.session import build_stepper
from nanochat_model.sft import SFTConfig, SFTRecord, plan_sft, sft, sft_recipe
from nanochat_model.train import pretrain

SIZE = {"model__sequence_len": 64, "batch_tokens": 256, "num_steps": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base run of a few steps."""
    folder = tmp_path_factory.mktemp("base")
    pretrain(tiny_config(**SIZE), RUNTIME, run_dir=folder)
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short ones with one rule to learn: the answer repeats the question."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    with path.open("w") as f:
        for _ in range(40):
            word = "".join(rng.choices("abcdefghij", k=4))
            f.write(json.dumps([{"role": "user", "content": word}, {"role": "assistant", "content": word * 2}]) + "\n")
    return path


class Losses(Callback):
    def __init__(self, crash_at: int = -1) -> None:
        self.losses: dict[int, float] = {}
        self.crash_at = crash_at

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.crash_at:
            raise InterruptedError
        self.losses[info.step] = info.train_loss
        self.skipped = info.skipped_steps


CONFIG = SFTConfig(num_steps=12, val_fraction=0.3, eval_every_steps=6)


def test_learns_what_the_assistant_says_and_records_it(base: Path, conversations: Path, tmp_path: Path) -> None:
    record = sft(CONFIG, RUNTIME, base_checkpoint=base, conversations=conversations, run_dir=tmp_path)
    assert record.status == "complete" and record.val_loss_after is not None
    assert record.val_loss_after < record.val_loss_before - 0.1
    assert SFTRecord.load(tmp_path) == record
    run = RunRecord.load(tmp_path)
    assert run.kind == "sft" and run.run_id == record.run_id and run.stage == "sft"
    assert run.val_bpb == run.curve[-1].val_bpb and run.parents == record.parents
    assert record.parents["base"] == checkpoint_hash(find_latest(base / CHECKPOINTS_DIR))
    assert record.num_conversations + record.num_val_conversations == 40 and record.num_truncated == 0
    assert [p.step for p in run.curve] == [6, 12]
    assert read_state(find_latest(tmp_path / CHECKPOINTS_DIR)).kind == "sft"
    assert load_model(tmp_path).config == load_model(base).config
    again = sft(CONFIG, RUNTIME, base_checkpoint=base, conversations=conversations, run_dir=tmp_path)
    assert again == record


def test_inherits_rates_and_decays_to_zero(base: Path, conversations: Path, tmp_path: Path) -> None:
    state = read_state(find_latest(base / CHECKPOINTS_DIR))
    config = plan_sft(SFTConfig(num_steps=10), base, conversations, tmp_path).config
    assert state.config is not None
    assert config.optimizer.matrix_lr == pytest.approx(0.8 * state.config.optimizer.matrix_lr)
    assert config.optimizer.embedding_lr == pytest.approx(0.8 * state.config.optimizer.embedding_lr)
    assert config.optimizer.weight_decay == 0 and config.batch_tokens == state.config.batch_tokens
    from nanochat_model.resume import multipliers_at

    rates = [multipliers_at(config, k).lr for k in range(10)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert multipliers_at(config, 9).momentum == pytest.approx(0.85 + 0.1 * 9 / 300)


def test_an_epoch_is_the_horizon_when_no_steps_are_given(base: Path, conversations: Path, tmp_path: Path) -> None:
    plan = plan_sft(SFTConfig(num_epochs=3), base, conversations, tmp_path)
    rows = ConversationLoader(plan.data.train, sequence_len=64, rows_per_batch=4).rows_per_epoch
    assert plan.config.num_steps == round(3 * rows / 4)
    recipe = sft_recipe(SFTConfig(num_epochs=3), plan.base, plan.data)
    assert recipe.resolve(recipe.inherited.model) == plan.config
    assert recipe.resolve(recipe.inherited.model, overrides={"batch_tokens": 512}).num_steps == round(3 * rows / 8)
    faster = recipe.resolve(recipe.inherited.model, overrides={"lr_multiplier": 2.0})
    assert faster.optimizer.matrix_lr == pytest.approx(1.6 * recipe.inherited.optimizer.matrix_lr)
    assert faster.optimizer.smear_lr == pytest.approx(1.6 * recipe.inherited.optimizer.smear_lr)
    with pytest.raises(ConfigError, match="weight decay 0"):
        recipe.resolve(recipe.inherited.model, overrides={"weight_decay_multiplier": 2.0})


def test_so_many_held_out_tokens_are_whole_rows(
    base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded up, as in pretraining: less than a row is one row, not all of them."""
    rows: list[int] = []
    monkeypatch.setattr("nanochat_model.sft.evaluate_loss", lambda model, validation: rows.append(len(validation[0])) or 1.0)
    for tokens in (1, 65, 0):
        config = dataclasses.replace(CONFIG, num_steps=1, eval_tokens=tokens)
        sft(config, RUNTIME, base_checkpoint=base, conversations=conversations, run_dir=tmp_path / str(tokens))
    assert rows[:4] == [1, 1, 2, 2] and rows[4] == rows[5] > 2


def test_warm_start_takes_over_the_optimizer(base: Path, conversations: Path, tmp_path: Path) -> None:
    """The first update differs with and without it, the first loss does not; and step counts go on."""
    seen = {}
    for warm in (True, False):
        losses = Losses()
        config = dataclasses.replace(CONFIG, warm_start=warm)
        sft(config, RUNTIME, base_checkpoint=base, conversations=conversations, run_dir=tmp_path / str(warm), callbacks=[losses])
        seen[warm] = losses.losses
        state = read_optimizer_state(find_latest(tmp_path / str(warm) / CHECKPOINTS_DIR))
        assert state is not None and state["num_steps"] == 12 + (8 if warm else 0)
    assert seen[True][1] == seen[False][1] and seen[True][2] != seen[False][2]


def test_interrupted_goes_on_to_the_bit(base: Path, conversations: Path, tmp_path: Path) -> None:
    whole, cut, rest = Losses(), Losses(crash_at=6), Losses()
    options = {"base_checkpoint": base, "conversations": conversations}
    saving = dataclasses.replace(RUNTIME, checkpoint_every_steps=2)
    expected = sft(CONFIG, saving, run_dir=tmp_path / "whole", callbacks=[whole], **options)
    with pytest.raises(InterruptedError):
        sft(CONFIG, saving, run_dir=tmp_path / "cut", callbacks=[cut], **options)
    record = sft(CONFIG, saving, run_dir=tmp_path / "cut", callbacks=[rest], **options)
    assert rest.losses == {k: v for k, v in whole.losses.items() if k > 4}
    assert (record.val_loss_before, record.val_loss_after) == (expected.val_loss_before, expected.val_loss_after)


def test_a_batch_without_anything_to_learn_is_passed_over(tmp_path: Path) -> None:
    from nanochat_model.distributed import Ranks
    from nanochat_model.resume import multipliers_at

    config: TrainConfig = tiny_config()
    model, _, stepper, _ = build_stepper(config, RUNTIME, Ranks())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = np.zeros((8, 32), np.int64)
    outcome = stepper.step(Batch(inputs=rows, targets=rows - 1, num_targets=0), multipliers_at(config, 0))
    assert outcome.skipped and not outcome.blamed
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_run_with_batches_of_nothing_to_learn_shows_no_nan_and_no_trouble(base: Path, tmp_path: Path) -> None:
    """Rows that a question fills alone: they are passed over, and the loss before them stands."""
    short = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes " * 9}] for i in range(8)]
    long = [[{"role": "user", "content": f"{i} " + "ab" * 200}, {"role": "assistant", "content": "no"}] for i in range(8)]
    path = write_jsonl(tmp_path / "chat.jsonl", [x for pair in zip(short, long, strict=True) for x in pair])
    losses, config = Losses(), SFTConfig(batch_tokens=64, num_epochs=2, val_fraction=0.3)
    record = sft(config, RUNTIME, base_checkpoint=base, conversations=path, run_dir=tmp_path / "run", callbacks=[losses])
    assert record.status == "complete" and 0 < record.skipped_steps < record.num_steps and record.num_truncated > 0
    finite = [step for step, loss in losses.losses.items() if math.isfinite(loss)]
    assert finite == list(range(finite[0], record.num_steps + 1)) and finite[0] <= record.skipped_steps + 1
    assert losses.skipped == 0, "nothing was wrong"


def test_only_supervised_targets_count(base: Path) -> None:
    """Mean over the targets of the whole batch, however they fall on micro-batches: the rows of one hold none at all."""
    from nanochat_model.distributed import Ranks

    config = tiny_config(**SIZE)
    model, _, stepper, _ = build_stepper(config, dataclasses.replace(RUNTIME, micro_batch_rows=1), Ranks())
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 300, (4, 64)), rng.integers(0, 300, (4, 64))
    targets[1] = -1
    targets[2, 5:] = -1
    part = stepper.forward_backward(Batch(inputs=inputs, targets=targets, num_targets=int((targets >= 0).sum())))
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected = model.loss(torch.from_numpy(inputs), torch.from_numpy(targets))
    expected.backward()
    assert part.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def test_an_imported_model_has_no_optimizer_to_take_over(base: Path, conversations: Path, tmp_path: Path) -> None:
    ours = find_latest(base / CHECKPOINTS_DIR)
    assert ours is not None
    meta = {"user_config": {"matrix_lr": 0.05, "unembedding_lr": None}, "total_batch_size": 192}
    state = CheckpointState(kind="imported", step=8, model=read_state(ours).model, extra={"source_meta": meta})
    imported = save_checkpoint(tmp_path / "imported", state, read_model_state(ours))
    copy_tokenizer(base / "tokenizer", tmp_path)
    options = {"base_checkpoint": imported, "conversations": conversations, "run_dir": tmp_path / "sft"}
    config = dataclasses.replace(CONFIG, num_steps=2, batch_tokens=128)
    with pytest.raises(ConfigError, match=r"set sft\.warm_start to False"):
        sft(config, RUNTIME, **options)
    record = sft(dataclasses.replace(config, warm_start=False), RUNTIME, **options)
    assert record.status == "complete" and record.train_config.batch_tokens == 128
    rates = record.train_config.optimizer
    assert (rates.matrix_lr, rates.unembedding_lr) == pytest.approx((0.8 * 0.05, 0.8 * 0.008)), "told by the checkpoint, and not"
    assert inherited_config(state).batch_tokens == 192


def test_bad_input_is_told(base: Path, conversations: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint at"):
        sft(CONFIG, RUNTIME, base_checkpoint=tmp_path / "none", conversations=conversations, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="neither a file or folder"):
        sft(CONFIG, RUNTIME, base_checkpoint=base, conversations=tmp_path / "none.jsonl", run_dir=tmp_path)
    with pytest.raises(ConfigError, match="val_fraction"):
        SFTConfig(val_fraction=0)
    sft(dataclasses.replace(CONFIG, num_steps=3), RUNTIME, base_checkpoint=base, conversations=conversations, run_dir=tmp_path)
    options = {"base_checkpoint": base, "conversations": conversations, "run_dir": tmp_path}
    with pytest.raises(ConfigError, match="of another run"):
        sft(dataclasses.replace(CONFIG, num_steps=2), RUNTIME, **options)
    record = sft(dataclasses.replace(CONFIG, num_steps=2), RUNTIME, resume=False, **options)
    newest = read_state(find_latest(tmp_path / CHECKPOINTS_DIR))
    assert (record.num_steps, newest.run_id) == (2, record.run_id), "the longer run's checkpoints are set aside"
    assert (tmp_path / f"{CHECKPOINTS_DIR}.before-1").is_dir()
