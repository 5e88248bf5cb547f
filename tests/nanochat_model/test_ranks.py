"""1, 2 and 3 processes train one model. 3 divides neither the 8 rows nor the matrices evenly, on purpose."""

import dataclasses
import json
import multiprocessing
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_jobs
from ports import free_port
from tiny_run import RUNTIME, STILL, tiny_config, tiny_shards

from nanochat_model import distributed, evaluate
from nanochat_model.errors import ConfigError
from nanochat_model.train import pretrain


def start_ranks(world_size: int, folder: Path, config: Any) -> list[dict[str, Any]]:
    """Run rank_jobs.run_rank in `world_size` processes, forked from a server that imported torch once; what each wrote."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_jobs"])
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]
    processes = [context.Process(target=rank_jobs.run_rank, args=(e, config, folder)) for e in environments]
    try:
        for p in processes:
            p.start()
        for p in processes:
            p.join(timeout=300)
            assert p.exitcode == 0, f"a rank ended with {p.exitcode}; its traceback is on standard error"
    finally:
        for p in processes:
            p.kill()
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(world_size)]


@lru_cache
def alone() -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return rank_jobs.train(tiny_config(**STILL), Path(folder) / "run")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Results of every rank; `resumed` starts from a checkpoint of step 6 that one process wrote."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")

    class Crash(rank_jobs.Losses):
        def on_step(self, info) -> None:
            if info.step == 8:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        saving = dataclasses.replace(RUNTIME, checkpoint_every_steps=6)
        pretrain(tiny_config(**STILL), saving, run_dir=folder / "resumed", callbacks=[Crash()])
    pretrain(tiny_config(**STILL, num_steps=3), RUNTIME, run_dir=folder / "base")
    rng = random.Random(0)
    talks = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": rng.choice("cdefg")}] for _ in range(30)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return folder, start_ranks(request.param, folder, tiny_config(**STILL))


def test_losses_agree_with_one_process(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        np.testing.assert_allclose(result["whole"]["losses"], alone()["losses"], rtol=2e-5)
        assert result["whole"]["val_bpb"] == pytest.approx(alone()["val_bpb"], rel=2e-5)
        assert result["whole"]["num_devices"] == len(ranks[1])


def test_evaluation_is_the_same_to_the_bit(ranks: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.CHUNK_TOKENS, "cpu", 0)  # restores what fresh_bpb sets
    assert {result["fresh_bpb"] for result in ranks[1]} == {rank_jobs.fresh_bpb(tiny_config(**STILL))}


def test_every_rank_is_told_the_same(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    own = ("tokens", "resumed_tokens")
    first = {k: v for k, v in ranks[1][0].items() if k not in own}
    for result in ranks[1][1:]:
        assert json.dumps({k: v for k, v in result.items() if k not in own}) == json.dumps(first)


def test_ranks_read_disjoint_rows_that_make_up_the_batch(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    from nanochat_model.loader import Loader

    config = tiny_config()
    loader = Loader(tiny_shards(), packing="keep_remainder", sequence_len=32, rows_per_batch=8, seed=config.seed)
    for k in range(config.num_steps):
        rows = [row for result in ranks[1] for row in result["tokens"][k]]
        assert rows == loader.batch(k)[0].tolist()


def test_resumes_on_another_number_of_ranks(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """A checkpoint of one process goes on in several, and one of several in one process."""
    folder, results = ranks
    np.testing.assert_allclose(results[0]["resumed"]["losses"], alone()["losses"][6:], rtol=2e-5)
    for result in results:
        assert {int(k): rows for k, rows in result["resumed_tokens"].items()} == dict(list(enumerate(result["tokens"]))[6:])
    (folder / "whole" / "record.json").unlink()
    last = folder / "whole" / "checkpoints" / "step_000012"
    last.rename(last.with_name("set-aside"))
    back = rank_jobs.train(tiny_config(**STILL), folder / "whole")
    np.testing.assert_allclose(back["losses"], alone()["losses"][6:], rtol=2e-5)


def test_resumed_on_as_many_ranks_losses_are_the_same_to_the_bit(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        assert result["again"]["losses"] == result["whole"]["losses"][6:]
        assert result["again"]["val_bpb"] == result["whole"]["val_bpb"]


def test_all_ranks_skip_a_step_that_is_bad_on_one(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        assert result["skip"]["skipped"] == 1 and result["skip"]["status"] == "complete"
        assert np.isnan(result["skip"]["losses"][3]) and np.isfinite(result["skip"]["losses"][4:]).all()


def test_records_name_the_slowest_rank(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        by_rank, seconds = result["skip"]["rank_compute_seconds"], result["skip"]["step_seconds"]
        assert len(by_rank) == len(ranks[1]) and by_rank.index(max(by_rank)) == len(ranks[1]) - 1
        assert max(by_rank) >= rank_jobs.LAG_SECONDS and seconds["wait"] > 0 and seconds["communication"] > 0
        assert result["skip"]["rank_compute_seconds"] == ranks[1][0]["skip"]["rank_compute_seconds"], "the same on every rank"


def test_lasting_trouble_on_one_rank_fails_all_and_is_located(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        assert result["lasting"]["status"] == "failed" and "since step 4" in result["lasting"]["error"]
        assert f"transformer.h.1.mlp.c_fc.weight (rank {len(ranks[1]) - 1})" in result["lasting"]["error"]


def test_a_stop_on_one_rank_stops_all_at_the_same_step(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        assert result["stopped"]["status"] == "stopped" and len(result["stopped"]["losses"]) == 5


def test_fine_tuning_is_the_same_on_one_rank(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Ranks with different numbers of supervised targets still make one mean over the batch."""
    np.testing.assert_allclose(ranks[1][0]["sft"], rank_jobs.tune(ranks[0]), rtol=2e-5)


def test_a_full_disk_ends_every_rank_and_the_checkpoint_before_is_used(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        assert result["full_disk"] == "no space left on device; 4 steps were left"


def test_errors_reach_every_rank(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        assert "fewer than the" in result["too_few_rows"] and result["error_everywhere"]


def test_several_processes_without_a_group_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="no process group joins them"):
        pretrain(tiny_config(), RUNTIME, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT is not"), distributed.process_group("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="must be a whole number"):
        distributed.current_ranks()
    assert not list(tmp_path.iterdir())
