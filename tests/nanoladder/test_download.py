"""Downloads from a hub that cuts, corrupts and rate-limits: what arrives is right, and nothing arrives twice in vain."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_hub import DATASET, FaultyHub, write_dataset
from huggingface_hub import get_session
from ray_nodes import wait_for
from task_files import arc_rows, gsm8k_rows, humaneval_rows, mmlu_rows, smoltalk_rows, write_parquet

from nanochat_model.errors import ConfigError
from nanochat_model.mixture import parse_sources
from nanochat_model.tasks.catalog import CHAT_TASKS, source_files, task_problems
from nanochat_model.tasks.catalog import DATASETS as TASK_DATASETS
from nanochat_model.tasks.files import count_rows
from nanochat_model.transfer import Line, Patience, RemoteFile, fetch, fetch_one, url_file
from nanoladder.cli import run
from nanoladder.download import State, dataset_folder, download, find_source, stored_revision, text_bytes
from nanoladder.shards_needed import bytes_for_depth, bytes_for_plan, fetch_needed, files_needed
from nanoladder.task_data import CHAT_DATASETS, fetch_chat_dataset

QUICK = Patience(max_failures=3, backoff_seconds=0.01, timeout_seconds=60)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FaultyHub]:
    write_dataset(tmp_path / "hub")
    with FaultyHub(tmp_path / "hub") as server:
        yield server


def originals(hub: FaultyHub) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((hub.root / DATASET).glob("*.parquet"))}


def stored(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet"))}


def test_the_list_has_every_page_with_sizes_and_checksums(hub: FaultyHub) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    assert [f.name for f in source.files] == list(originals(hub)), "only parquet, in order, over three pages"
    for file, data in zip(source.files, originals(hub).values(), strict=True):
        assert file.size == len(data) and file.sha256 == hashlib.sha256(data).hexdigest()
    assert source.revision == hub.commit(DATASET) and source.revision in source.files[0].url


def test_parallel_download_is_verified_and_a_second_call_fetches_nothing(hub: FaultyHub, tmp_path: Path) -> None:
    seen = []
    source = find_source(DATASET, endpoint=hub.endpoint)
    done = download(source, tmp_path / "out", num_files=4, patience=QUICK, progress=seen.append)
    assert stored(tmp_path / "out") == dict(list(originals(hub).items())[:4])
    assert {f["verified"] for f in done.files} == {"sha256"} and done.fetched_bytes == done.num_bytes
    assert seen[-1].done_bytes == seen[-1].total_bytes == done.num_bytes and seen[-1].done_files == 4
    sent = sum(hub.sent.values())
    again = download(source, tmp_path / "out", num_files=5, patience=QUICK)
    assert sum(hub.sent.values()) - sent == source.files[4].size, "only the fifth"
    assert again.files[:4] == done.files and again.hash != done.hash
    assert stored_revision(tmp_path / "out") == source.revision
    (tmp_path / "out" / source.files[2].name).write_bytes(b"spoiled on disk")
    assert download(source, tmp_path / "out", patience=QUICK).hash == again.hash
    assert stored(tmp_path / "out") == originals(hub)
    path = tmp_path / "out" / source.files[1].name  # same size and time, other bytes: only reading shows it
    stat, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert download(source, tmp_path / "out", patience=QUICK).fetched_bytes == 0
    assert download(source, tmp_path / "out", patience=QUICK, check=True).fetched_bytes == len(data)
    assert stored(tmp_path / "out") == originals(hub)


def test_cut_connections_go_on_where_they_broke(hub: FaultyHub, tmp_path: Path) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    name = Path(source.files[0].name).stem
    hub.cut_after[name] = [10_000, 5_000, 0, 7_000]
    done = download(source, tmp_path / "out", patience=QUICK)
    assert stored(tmp_path / "out") == originals(hub)
    assert hub.ranges[name] == [0, 10_000, 15_000, 15_000, 22_000], "each byte once"
    assert hub.sent[name] == source.files[0].size and done.refetched >= 4
    assert not list((tmp_path / "out").glob("*.part*"))


def test_a_line_that_brings_nothing_is_given_up_and_the_rest_is_kept(hub: FaultyHub, tmp_path: Path) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    hub.cut_after["shard_00001"] = [3000, *[0] * 20]
    with pytest.raises(ConfigError, match=r"1 of 5 files could not be had: shard_00001.parquet: .*3 attempts.*4 are verified"):
        download(source, tmp_path / "out", patience=QUICK)
    assert len(stored(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "shard_00001.parquet.part").stat().st_size == 3000
    hub.cut_after.clear()
    states: list[State] = []
    download(source, tmp_path / "out", patience=QUICK, progress=states.append)
    assert hub.ranges["shard_00001"][-1] == 3000 and stored(tmp_path / "out") == originals(hub)
    total = sum(f.size or 0 for f in source.files)
    kept = total - (source.files[1].size or 0) + 3000
    assert states[0].done_bytes > kept and states[-1].done_bytes == total, "what was here is no speed of this call"
    assert all(s.done_bytes >= kept for s in states)


def test_corrupt_content_is_fetched_once_more_and_then_named(hub: FaultyHub, tmp_path: Path) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    hub.corrupt["shard_00000"] = 1
    hub.corrupt["shard_00003"] = 2
    with pytest.raises(ConfigError, match=r"shard_00003.parquet: SHA-256 is .*announced was .*twice; the copy on the server"):
        download(source, tmp_path / "out", patience=QUICK)
    assert hub.ranges["shard_00000"] == [0, 0] and hub.ranges["shard_00003"] == [0, 0]
    expected = originals(hub)
    del expected["shard_00003.parquet"]
    assert stored(tmp_path / "out") == expected, "nothing wrong is left, and the rest is there"
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_busy_server_is_left_alone_as_long_as_it_asks(hub: FaultyHub, tmp_path: Path) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    hub.busy["shard_00002"], hub.retry_after = 2, "0.3"
    started = time.monotonic()
    done = download(source, tmp_path / "out", patience=QUICK)
    assert time.monotonic() - started > 0.55 and done.refetched == 2
    assert stored(tmp_path / "out") == originals(hub)
    hub.busy["text"] = 1  # the API itself
    hub.retry_after = "0.01"
    assert find_source(DATASET, endpoint=hub.endpoint).files == source.files
    hub.busy["shard_00001"], hub.retry_after = 1, "4000"
    with pytest.raises(ConfigError, match="asks to come back in 4000 s"):
        download(source, tmp_path / "other", patience=QUICK)


def test_a_server_without_ranges_still_gives_the_whole_file(hub: FaultyHub, tmp_path: Path) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    hub.ignore_ranges, hub.cut_after["shard_00000"] = True, [4000]
    seen = []
    done = download(source, tmp_path / "out", num_files=1, patience=QUICK, progress=seen.append)
    assert list(stored(tmp_path / "out").values()) == list(originals(hub).values())[:1]
    assert seen[-1].done_bytes == done.num_bytes, "bytes received twice are not counted twice"


def test_a_part_of_another_version_is_not_continued(hub: FaultyHub, tmp_path: Path) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    hub.cut_after["shard_00000"] = [3000, *[0] * 5]
    with pytest.raises(ConfigError):
        download(source, tmp_path / "out", num_files=1, patience=QUICK)
    pq.write_table(pa.table({"text": ["entirely", "other"] * 400}), hub.root / DATASET / "shard_00000.parquet")
    hub.cut_after.clear()
    new = find_source(DATASET, endpoint=hub.endpoint)
    assert new.revision != source.revision
    states: list[State] = []
    download(new, tmp_path / "out", num_files=1, patience=QUICK, progress=states.append)
    assert hub.ranges["shard_00000"][-1] == 0 and states[-1].done_bytes == new.files[0].size
    assert list(stored(tmp_path / "out").values()) == list(originals(hub).values())[:1]


def test_plain_addresses_with_a_checksum(hub: FaultyHub, tmp_path: Path) -> None:
    url = f"{hub.endpoint}/datasets/{DATASET}/resolve/main/shard_00000.parquet"
    data = originals(hub)["shard_00000.parquet"]
    right = f"{url}#sha256={hashlib.sha256(data).hexdigest()}"
    source = find_source(right)
    assert source.files[0].size == len(data)
    hub.cut_after["shard_00000"] = [2000]
    folder = dataset_folder(tmp_path, right)
    assert download(source, folder, patience=QUICK).files[0]["verified"] == "sha256"
    assert stored(folder) == {"shard_00000.parquet": data}
    with pytest.raises(ConfigError, match="twice"):
        fetch_one(f"{url}#sha256={'0' * 64}", tmp_path / "one.parquet", patience=QUICK)
    assert fetch_one(right, tmp_path / "one.parquet", patience=QUICK).read_bytes() == data
    with pytest.raises(ConfigError, match=r"two addresses end in 'shard_00000.parquet'"):
        find_source(f"{url} {right}")


@pytest.mark.parametrize("name", ["../x.parquet", "a/../../x.parquet", "/x.parquet"])
def test_a_file_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="leaves the folder"):
        RemoteFile(name=name, url="http://hub/x")


def test_a_full_disk_is_no_broken_connection(hub: FaultyHub, tmp_path: Path) -> None:
    def full(num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = url_file(f"{hub.endpoint}/datasets/{DATASET}/resolve/main/shard_00000.parquet")
    with pytest.raises(ConfigError, match="No space left"):
        fetch(file, tmp_path, Line(patience=QUICK), full)


def test_room_is_asked_for_what_has_not_arrived(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    total = sum(f.size or 0 for f in source.files)
    free = total - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match="GB are to be fetched"):
        download(source, tmp_path / "out", patience=QUICK)
    free = total
    hub.cut_after["shard_00001"] = [3000, *[0] * 20]
    with pytest.raises(ConfigError, match="1 of 5 files could not be had"):
        download(source, tmp_path / "out", patience=QUICK)
    hub.cut_after.clear()
    free = (source.files[1].size or 0) - 3000
    download(source, tmp_path / "out", patience=QUICK)
    assert stored(tmp_path / "out") == originals(hub)


def test_pages_of_a_mirror_begin_at_a_number(hub: FaultyHub) -> None:
    assert get_session().get(f"{hub.endpoint}/api/datasets/{DATASET}/tree/main?cursor=x").status_code == 400


def test_what_no_patience_mends_is_one_clear_line(hub: FaultyHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HTTP 404; there is no such file"):
        find_source("local/nothing", endpoint=hub.endpoint)
    with pytest.raises(ConfigError, match="none of climbmix, fineweb-edu, no owner/name"):
        find_source("pile")
    (hub.root / "local" / "empty").mkdir()
    (hub.root / "local" / "empty" / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds no \.parquet file"):
        find_source("local/empty", endpoint=hub.endpoint)
    (hub.root / "local" / "columns").mkdir()
    pq.write_table(pa.table({"content": ["a"]}), hub.root / "local" / "columns" / "a.parquet")
    with pytest.raises(ConfigError, match=r"no column 'text', only 'content'"):
        download(find_source("local/columns", endpoint=hub.endpoint), tmp_path / "columns", patience=QUICK)
    source = find_source(DATASET, endpoint=hub.endpoint)
    download(source, tmp_path / "out", num_files=1, patience=QUICK)
    with pytest.raises(ConfigError, match="choose another folder"):
        download(find_source("local/columns", endpoint=hub.endpoint), tmp_path / "out", patience=QUICK)


def test_a_token_goes_to_the_hub_and_not_to_plain_addresses(hub: FaultyHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(find_source(DATASET, endpoint=hub.endpoint), tmp_path / "a", num_files=1, patience=QUICK)
    assert hub.tokens == {"Bearer hf_secret"}
    hub.tokens.clear()
    url = f"{hub.endpoint}/datasets/{DATASET}/resolve/main/shard_00000.parquet"
    download(find_source(url), tmp_path / "b", patience=QUICK)
    assert hub.tokens == {""}


def test_a_killed_command_goes_on(hub: FaultyHub, tmp_path: Path) -> None:
    """kill -9 half way, through the command line; the second start asks for the rest only."""
    names = [Path(n).stem for n in originals(hub)]
    for name in names[2:]:
        hub.cut_after[name] = [4096, *[0] * 500]
    command = [sys.executable, "-c", "from nanoladder.cli import main; main()", "data", "download", "--dataset", DATASET]
    command += ["--shards", "0", "--storage", str(tmp_path / "root"), "--endpoint", hub.endpoint]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    folder = tmp_path / "root" / "download" / "local--text"
    try:
        wait_for(lambda: len(stored(folder)) == 2 and all(len(hub.ranges.get(n, [])) > 1 for n in names[2:]), every=0.02)
    finally:
        victim.kill()
        victim.wait()
    assert len(stored(folder)) == 2
    hub.cut_after.clear()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert stored(folder) == originals(hub) and len(facts["files"]) == 5
    assert {hub.ranges[n][-1] for n in names[2:]} == {4096} and hub.ranges[names[0]] == [0]


@pytest.fixture
def chat_hub(tmp_path: Path) -> Iterator[FaultyHub]:
    """The five chat and evaluation sets as they lie on the hub, with configurations that nobody here reads."""
    root = tmp_path / "hub"
    for subset in ("ARC-Easy", "ARC-Challenge"):
        for split in ("train", "test"):
            write_parquet(root / "allenai/ai2_arc" / subset / f"{split}-00000-of-00001.parquet", arc_rows(9))
    mmlu = root / "cais/mmlu"
    write_parquet(mmlu / "all/auxiliary_train-00000-of-00001.parquet", [{"train": row} for row in mmlu_rows(400)])
    write_parquet(mmlu / "all/test-00000-of-00001.parquet", mmlu_rows(10))
    write_parquet(mmlu / "anatomy/test-00000-of-00001.parquet", mmlu_rows(3))
    for split in ("train", "test"):
        write_parquet(root / "openai/gsm8k/main" / f"{split}-00000-of-00001.parquet", gsm8k_rows(8))
        write_parquet(root / "openai/gsm8k/socratic" / f"{split}-00000-of-00001.parquet", gsm8k_rows(8))
        write_parquet(root / "HuggingFaceTB/smol-smoltalk/data" / f"{split}-00000-of-00001.parquet", smoltalk_rows(6))
    write_parquet(root / "openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet", humaneval_rows(5))
    with FaultyHub(root) as server:
        yield server


def test_chat_sets_come_to_where_fine_tuning_and_evaluation_look(chat_hub: FaultyHub, tmp_path: Path, capsys) -> None:
    assert set(CHAT_DATASETS.values()) == {d.repository for d in TASK_DATASETS.values()}
    tasks = tmp_path / "tasks"
    command = ["data", "download", "--dataset", "chat", "--tasks-dir", str(tasks), "--endpoint", chat_hub.endpoint]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["datasets"]
    assert [d["dataset"] for d in found] == list(CHAT_DATASETS.values())
    names = {p.relative_to(tasks).as_posix() for p in tasks.rglob("*.parquet")}
    offered = {p.relative_to(chat_hub.root).as_posix() for p in chat_hub.root.rglob("*.parquet")}
    assert names == {n for n in offered if "anatomy" not in n and "socratic" not in n}
    assert all((tasks / n).read_bytes() == (chat_hub.root / n).read_bytes() for n in names)
    counts = {task: len(task_problems(task, tasks_dir=tasks)) for task in CHAT_TASKS}
    assert counts == {"ARC-Easy": 9, "ARC-Challenge": 9, "MMLU": 10, "GSM8K": 8, "HumanEval": 5}
    mixture = parse_sources(["nanochat"])
    rows = [count_rows(source_files(s.data, tasks_dir=tasks, split=s.training_split)) for s in mixture]
    assert rows == [6, 400, 8, 6, 10, 8]
    sent = sum(chat_hub.sent.values())
    assert run(command) == 0 and sum(chat_hub.sent.values()) == sent, "a second call fetches nothing"
    assert f"nanoladder sft --checkpoint RUN --tasks-dir {tasks}" in capsys.readouterr().out


def test_a_broken_chat_download_goes_on_and_what_cannot_be_read_is_named(chat_hub: FaultyHub, tmp_path: Path, capsys) -> None:
    name, fetch = "auxiliary_train-00000-of-00001", partial(fetch_chat_dataset, endpoint=chat_hub.endpoint, patience=QUICK)
    chat_hub.cut_after[name] = [900, *[0] * 20]
    with pytest.raises(ConfigError, match=f"1 of 2 files could not be had: all/{name}"):
        fetch("cais/mmlu", tmp_path / "tasks")
    chat_hub.cut_after.clear()
    fetch("cais/mmlu", tmp_path / "tasks")
    assert chat_hub.ranges[name][-1] == 900, "from where it broke"
    pq.write_table(pa.table({"prose": ["a"]}), chat_hub.root / "openai/gsm8k/main/train-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="columns prose fit no known layout"):
        fetch("openai/gsm8k", tmp_path / "tasks")
    assert run(["data", "download", "--dataset", "chat", "--depth", "12"]) == 2
    assert "--depth is for data sets of text" in capsys.readouterr().err
    assert run(["data", "download", "--dataset", "smoltak"]) == 2
    assert "'smoltak' is none of climbmix, fineweb-edu, smoltalk" in capsys.readouterr().err
    assert run(["data", "download", "--dataset", "chat", "--revision", "v2"]) == 2
    assert "'v2' is of one data set" in capsys.readouterr().err


def test_shards_that_a_plan_needs(hub: FaultyHub, tmp_path: Path) -> None:
    source = find_source(DATASET, endpoint=hub.endpoint)
    first = hub.root / DATASET / "shard_00000.parquet"
    size = sum(len(t.encode()) for t in pq.read_table(first)["text"].to_pylist())
    assert text_bytes(first) == size
    assert files_needed(2.5 * size, size, val_fraction=0.05) == 3
    done, note = fetch_needed(source, tmp_path / "out", 2.5 * size, patience=QUICK)
    assert len(done.files) == 3 and "3 files" in note
    done, note = fetch_needed(source, tmp_path / "out", 50 * size, patience=QUICK)
    assert len(done.files) == 5 and "has only 5" in note
    (tmp_path / "plan.json").write_text(json.dumps({"data_bytes": 1e6}))
    assert bytes_for_plan(tmp_path / "plan.json") == 1e6
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no plan"):
        bytes_for_plan(tmp_path / "plan.json")
    assert bytes_for_depth(24) > 10 * bytes_for_depth(8)
