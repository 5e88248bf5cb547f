"""The cluster files pass Ray's own schema check, and carry what keeps a cluster private."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-mi300x.yaml"])
def test_cluster_file_is_valid_by_rays_schema(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / name).read_text()))
    validate_config(config)
    assert all("RAY_AUTH_MODE=token" in c for c in config["head_start_ray_commands"] if "ray start" in c)
    assert all("--dashboard-host=127.0.0.1" in c for c in config["head_start_ray_commands"] if "ray start" in c)


def test_platform_is_a_plain_folder():
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_runtime_env_ships_the_package():
    env = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    assert (ROOT / env["env_vars"]["PYTHONPATH"] / "nanoladder").is_dir()
