"""The cluster files pass Ray's own schema check, and carry what keeps a cluster private, whole and findable."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanoladder.actor_backend import TrialActor
from nanoladder.node_labels import NodeLabels, coming_gpus, resources_of_nodes
from nanoladder.trial_spec import TrialSpec

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "cluster-mi300x.yaml")


def prepared(name: str) -> dict[str, Any]:
    """The file as the autoscaler sees it."""
    from ray.autoscaler._private.util import prepare_config

    return dict(prepare_config(yaml.safe_load((ROOT / name).read_text())))


def starts(config: dict[str, Any]) -> list[str]:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [c for c in commands if "ray start" in c]


@pytest.mark.parametrize("name", FILES)
def test_cluster_file_is_valid_by_rays_schema(name: str) -> None:
    from ray.autoscaler._private.util import validate_config

    config = prepared(name)
    validate_config(config)
    assert config["max_workers"] > 0 and config["idle_timeout_minutes"] > 0
    assert all(t["max_workers"] >= t["min_workers"] >= 0 for t in config["available_node_types"].values())
    with pytest.raises(Exception, match="max_werkers"):
        validate_config(prepared(name) | {"max_werkers": 1})


@pytest.mark.parametrize("name", FILES)
def test_every_node_asks_for_the_token_and_the_dashboard_stays_inside(name: str) -> None:
    config = prepared(name)
    commands = starts(config)
    assert len(commands) == 2 and all("RAY_AUTH_MODE=token" in c for c in commands)
    assert "--dashboard-host=127.0.0.1" in commands[0] and "--dashboard-host" not in commands[1]
    assert "~/.ray/auth_token" in config["file_mounts"] and "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert "0.0.0.0" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_jobs_python_is_the_one_that_was_set_up_and_records_have_a_place(name: str) -> None:
    for command in starts(prepared(name)):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, "valid shell"
        assert command.index("source ~/env/bin/activate") < command.index("ray start") and "NANOLADDER_STORAGE=" in command
        assert command.startswith("cd ~/nanoladder")


@pytest.mark.parametrize(
    ("name", "index", "label"), [("cluster.yaml", "cu130", "h100"), ("cluster-mi300x.yaml", "rocm7.0", "mi300x")]
)
def test_wheels_and_labels_are_the_vendors(name: str, index: str, label: str) -> None:
    config = prepared(name)
    (torch_command,) = (c for c in config["setup_commands"] if "torch==" in c)
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert index in torch_command and pinned in torch_command
    assert f"--labels gpu={label}" in starts(config)[1]
    assert "accelerator_type" not in (ROOT / name).read_text()


def test_workers_have_a_role_for_the_bucket() -> None:
    """Ray gives the one that it makes to the head alone (ray/autoscaler/_private/aws/config.py, _configure_iam_role)."""
    config = prepared("cluster.yaml")
    assert "NANOLADDER_STORAGE=s3://" in starts(config)[1]
    workers = [t["node_config"] for name, t in config["available_node_types"].items() if name != config["head_node_type"]]
    assert workers and all(w.get("IamInstanceProfile") for w in workers)


def test_a_sweep_for_a_device_goes_to_nodes_of_that_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert coming_gpus(ROOT / "cluster.yaml") == {"h100"} and coming_gpus(tmp_path / "none") == set()
    both = NodeLabels(present=frozenset({"h100", "mi300x"}))
    assert both.selector("h100") == {"gpu": "h100"} and both.selector("cpu") == both.selector("") == {}
    assert NodeLabels(coming=frozenset({"h100"})).selector("H100") == {"gpu": "h100"}, "the node is yet to be started"
    assert NodeLabels().selector("h100") == {}, "a cluster without labels has one kind of GPU"
    with pytest.raises(ConfigError, match="labels gpu=mi300x"):
        NodeLabels(present=frozenset({"mi300x"})).selector("h100")
    nodes = [("H100", 8.0, True), ("h100", 4.0, True), ("h100", 8.0, False), ("mi300x", 8.0, True)]
    listed = [{"Labels": {"gpu": label}, "Resources": {"GPU": n}, "Alive": alive} for label, n, alive in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [*listed, {"Labels": {}, "Resources": {"CPU": 4.0}, "Alive": True}])
    assert resources_of_nodes({"gpu": "h100"}) == {"GPU": 12.0}
    spec = TrialSpec(
        run_id="r", config=TrainConfig(), runtime=RuntimeConfig(), run_dir="r", node_labels={"gpu": "h100"},
        resources_per_worker={"CPU": 1.0, "GPU": 1.0},
    )  # fmt: skip
    request = TrialActor.default_resource_request({"spec": spec.to_json()})
    assert request.bundles == [{"CPU": 1.0, "GPU": 1.0}] and request._kwargs["bundle_label_selector"] == [{"gpu": "h100"}]


def test_platform_is_a_plain_folder() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_runtime_env_ships_the_package() -> None:
    env = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    assert env["working_dir"] == "." and [Path(m).name for m in env["py_modules"]] == ["nanoladder"]
    assert all((ROOT / m / "__init__.py").is_file() for m in env["py_modules"])
    assert {"/.git/", "/.venv/", "/runs/", "/demo/"} <= set(env["excludes"])


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.py")), ids=lambda p: p.name)
def test_sweep_files_run_as_they_are_typed(path: Path) -> None:
    """`ray job submit sweeps/x.py` hands the file to a shell."""
    assert path.read_text().startswith("#!/usr/bin/env python3\n") and os.access(path, os.X_OK)
