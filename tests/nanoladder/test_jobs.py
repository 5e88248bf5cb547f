"""Sweeps as jobs on a real cluster with token authentication, on whose Python nanoladder is not installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import pytest
from breaking_training import PAUSE_ENV
from private_cluster import PrivateCluster
from tiny_run import tiny_shards

from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanoladder.job_context import check_lasting, default_storage
from nanoladder.job_hook import check_runs_alone, with_options
from nanoladder.submit import choose_address, find_runtime_env, load_runtime_env
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(100)
ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
TINY = textwrap.dedent(
    '''\
    #!/usr/bin/env python3
    """Which weight decay is best for a model of two layers?"""

    from functools import partial

    from nanochat_model.config import EvalConfig, RuntimeConfig
    from nanoladder import Cell, GPTConfig, Grid, Horizon, Recipe, Sweep, execute, run_sweep

    MODEL = GPTConfig(depth=2, model_dim=32, num_heads=2, num_kv_heads=1, sequence_len=32, vocab_size=320, window_pattern="L")
    SWEEP = Sweep(
        name="tiny",
        question="Which weight decay is best for a model of two layers?",
        recipe=Recipe(eval=EvalConfig(num_tokens=2048, every_steps=50), compute_dtype="float32"),
        cells=(Cell(model=MODEL, horizon=Horizon(num_steps=300), overrides={"batch_tokens": 256}),),
        space={"weight_decay_multiplier": Grid([0.5, 1])},
        packing="keep_remainder",
        backend="actor",
        runtime=RuntimeConfig(device="cpu", num_threads=1, micro_batch_rows=4, log_every_steps=10, compile="off"),
    )

    if __name__ == "__main__":
        execute.execute_sweep = partial(execute.execute_sweep, train_function="breaking_training:paused")
        run_sweep(SWEEP)
    '''
)
# A trial must last: Ray's processes report their metrics once a second.
PAUSE_SECONDS = 0.07  # after every tenth of 300 steps


class Place:
    """A checkout to submit from, the cluster, and the storage root that it has."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "repo"
        for name in ("platform", "nanochat_model", "analysis"):
            shutil.copytree(ROOT / name, self.repo / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "runtime_env.yaml", self.repo)
        shutil.copy(SUPPORT / "breaking_training.py", self.repo)
        self.sweep = self.repo / "sweeps" / "tiny.py"
        self.sweep.parent.mkdir()
        self.sweep.write_text(TINY)
        self.sweep.chmod(0o755)
        self.storage = folder / "storage"
        shutil.copytree(Path(tiny_shards().path), self.storage / "shards")
        pause = {PAUSE_ENV: str(PAUSE_SECONDS), "RAY_metrics_report_interval_ms": "500"}
        self.cluster = PrivateCluster({"NANOLADDER_STORAGE": str(self.storage), **pause})

    def call(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A client's command in the checkout."""
        ours = {"RAY_API_SERVER_ADDRESS": self.cluster.url, "PYTHONPATH": ""}
        return subprocess.run(
            command, cwd=self.repo, env=self.cluster.env | ours | env, capture_output=True, text=True, timeout=900
        )

    def nanoladder(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-c", "from nanoladder.cli import main; main()", *args, **env)

    def ray(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.call(str(Path(sys.executable).parent / "ray"), *args, **env)

    def records(self) -> list[RunRecord]:
        return Workspace(self.storage).records()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("jobs"))
    try:
        place.cluster.start()
        yield place
    finally:
        place.cluster.stop()


def test_a_sweep_is_submitted_in_three_ways_and_leaves_records(place: Place) -> None:
    with Scrape(place.cluster) as scrape:
        done = place.nanoladder("submit", "sweeps/tiny.py", "--max-concurrent", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("job tiny-") and finished(done) == 2 and "2 runs, 0 failed" in done.stdout
    assert "Traceback" not in done.stdout and not done.stderr
    records = place.records()
    assert [r.status for r in records] == ["complete"] * 2 and {r.sweep for r in records} == {"tiny"}

    options = ("--set", "seeds=1", "--max-concurrent", "1")
    done = place.ray("job", "submit", "--runtime-env", "runtime_env.yaml", "--", "python", "sweeps/tiny.py", *options)
    assert done.returncode == 0 and finished(done) == 2, done.stdout + done.stderr
    assert sorted(r.seed for r in place.records()) == [0, 0, 1, 1]

    done = place.ray("job", "submit", "sweeps/tiny.py", RAY_JOB_SUBMIT_HOOK="nanoladder.job_hook.ship_this_folder")
    assert done.returncode == 0 and "2 runs were recorded already" in done.stdout, done.stdout + done.stderr
    assert len(place.records()) == 4, "what is recorded is not run again"

    jobs = json.loads(place.call(sys.executable, "-c", LIST_JOBS).stdout)
    assert [j["status"] for j in jobs] == ["SUCCEEDED"] * 3
    assert all("2 runs, 0 failed" in j["log"] and j["log_at"].startswith("http") for j in jobs), "the dashboard's link to a log"
    mine, plain, typed = jobs
    assert mine["entrypoint"] == "python sweeps/tiny.py --max-concurrent 1" and mine["id"].startswith("tiny-")
    assert (mine["metadata"]["job_name"], mine["metadata"]["question"][:5]) == ("tiny", "Which")
    assert plain["entrypoint"] == "python sweeps/tiny.py --set seeds=1 --max-concurrent 1" and plain["id"].startswith("raysubmit_")
    assert typed["entrypoint"] == "sweeps/tiny.py" and typed["metadata"]["sweep_file"] == "sweeps/tiny.py"

    assert {"tokens_per_second", "train_loss", "val_bpb", "progress", "memory_bytes"} <= scrape.names, "mfu: no peak is known here"
    assert scrape.trials == {f"tiny | d2w32-300steps | weight_decay_multiplier={x} | seed 0" for x in (0.5, 1)}


class Scrape:
    """Looks at the node's metrics, as Prometheus does, while something runs: our gauges, and the trials that they speak of."""

    def __init__(self, cluster: PrivateCluster) -> None:
        self._url = f"http://127.0.0.1:{cluster.metrics_port}/metrics"
        self._token = {"Authorization": f"Bearer {cluster.token_file.read_text()}"}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.names: set[str] = set()
        self.trials: set[str] = set()

    def __enter__(self) -> Scrape:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        over = False
        while not over:
            over = self._end.wait(0.3)  # a last look when it is over
            request = urllib.request.Request(self._url, headers=self._token)
            try:
                with urllib.request.urlopen(request, timeout=5) as reply:
                    lines = reply.read().decode().splitlines()
            except (OSError, HTTPException):  # the node's agent comes up after the head
                continue
            for line in lines:
                if line.startswith("ray_nanoladder_"):
                    self.names.add(line.removeprefix("ray_nanoladder_").split("{")[0])
                    self.trials |= set(re.findall(r'trial="([^"]*)"', line))


def finished(done: subprocess.CompletedProcess[str]) -> int:
    """Lines of finished trials."""
    return sum(line.startswith("bpb ") for line in done.stdout.splitlines())


RUN_EACH = """
import json, sys
from nanoladder.cli import run
for args in json.loads(sys.argv[1]):
    print(run(args))
"""
LIST_JOBS = """
import json
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient()
jobs = [j for j in client.list_jobs() if j.submission_id]
print(json.dumps([{"id": j.submission_id, "metadata": j.metadata or {}, "entrypoint": j.entrypoint, "status": j.status.value,
                   "log": client.get_job_logs(j.submission_id), "log_at": j.driver_agent_http_address}
                  for j in sorted(jobs, key=lambda j: j.start_time)]))
"""


def test_a_job_that_would_not_start_is_refused_in_one_line(place: Place, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    refused = {
        "asks for a token and it refuses the token": ("--token-file", str(wrong)),
        "no Ray dashboard answers at http://127.0.0.1:1": ("--address", "http://127.0.0.1:1"),
        "did you mean 'num_trials'?": ("--set", "num_trails=3"),
    }
    commands = [["submit", "sweeps/tiny.py", *args] for args in refused.values()]
    done = place.call(sys.executable, "-c", RUN_EACH, json.dumps(commands))
    lines = done.stderr.splitlines()
    assert done.stdout.split() == ["2"] * 3 and len(lines) == 3, done.stderr + done.stdout
    assert all(message in line for message, line in zip(refused, lines, strict=True)), lines
    assert wrong.stat().st_mode & 0o077 == 0, "a token is for nobody else"
    done = place.ray("job", "submit", "sweeps/tiny.py")  # without the hook Ray ships nothing and starts where it was started
    assert done.returncode == 1 and "sweeps/tiny.py: not found" in done.stdout + done.stderr, done.stdout + done.stderr


def test_the_doctor_visits_every_node(place: Place) -> None:
    done = place.nanoladder("doctor", "--address", place.cluster.url, "--quick", "--json")
    facts = json.loads(done.stdout)
    node, cluster = facts["examinations"]
    by_check = {f["check"]: f for f in node["findings"]}  # how full a disk is depends on the machine, what is looked at does not
    assert {"python", "disk", "shared memory", "devices", "attention", "bf16", "fp8", "token"} <= set(by_check)
    assert {by_check[check]["severity"] for check in ("python", "token")} == {"ok"}
    assert by_check["python"]["facts"]["executable"] == str(place.cluster.python), "the job's Python is the head's"
    assert not [f for f in node["findings"] if f["check"] == "python" and f["severity"] == "warning"], "and so is its PATH's"
    assert any(str(place.storage) in f["text"] for f in node["findings"] if f["check"] == "disk")
    assert cluster["node"] == "cluster of 1 nodes"
    assert [(f["check"], f["severity"]) for f in cluster["findings"]] == [
        ("versions", "ok"), ("clock", "ok"), ("dashboard", "ok"), ("authentication", "ok")
    ]  # fmt: skip
    assert done.returncode == (1 if facts["worst"] == "error" else 0)


def test_what_is_shipped_is_found_from_the_file_and_counts_from_its_own_folder(tmp_path: Path) -> None:
    found = find_runtime_env(ROOT / "sweeps" / "wd_d20.py")
    env = load_runtime_env(found)
    assert found == ROOT / "runtime_env.yaml" and Path(env["working_dir"]) == ROOT
    assert env["py_modules"] == [str(ROOT / "platform" / "nanoladder")]
    with pytest.raises(ConfigError, match=r"no runtime_env\.yaml above"):
        find_runtime_env(tmp_path / "x.py")
    shutil.copy(found, tmp_path)
    excludes = load_runtime_env(tmp_path / found.name)["excludes"]
    (tmp_path / "mine" / "shards").mkdir(parents=True)
    (tmp_path / "mine" / "shards" / "manifest.json").touch()
    assert load_runtime_env(tmp_path / found.name)["excludes"] == [*excludes, "/mine/"], "shards and runs never travel"


def test_a_file_that_no_shell_could_run_is_refused_before_it_is_shipped(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("SWEEP = 1\n")
    with pytest.raises(
        SystemExit, match=r"lacks its run bit \(chmod \+x .*x\.py\) and the first line #!/usr/bin/env python3, and Ray"
    ):
        check_runs_alone(str(path))
    path.write_text("#!/usr/bin/env python3\n")
    path.chmod(0o755)
    for file in (str(path), "python", "elsewhere.py"):
        check_runs_alone(file)


def test_results_never_land_in_rays_copy_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("NANOLADDER_STORAGE", raising=False)
    check_lasting(default_storage())  # no job: a user may be anywhere
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="removed after the job; give --storage"):
        check_lasting(default_storage())
    check_lasting("s3://bucket/runs")
    monkeypatch.setenv("NANOLADDER_STORAGE", str(tmp_path / "shared"))
    check_lasting(default_storage())


def test_addresses_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:8265")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert choose_address() == "http://10.0.0.1:8265" and choose_address("auto") == "auto"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://head")
    assert choose_address() == "https://head" and choose_address("http://x:1") == "http://x:1"
    argv = ["/bin/ray", "job", "submit", "--no-wait", "--", "sweeps/x.py", "submit"]
    assert with_options(argv, ["--a", "b"]) == ["/bin/ray", "job", "submit", "--a", "b", *argv[3:]]
