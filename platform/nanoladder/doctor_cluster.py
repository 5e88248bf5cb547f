"""The doctor's round of a cluster: one task on every node, then what only shows when nodes are compared."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from typing import Any

from nanochat_model.errors import ConfigError
from nanoladder.doctor import Examination, Finding, error, examine, ok, warning

NODE_SECONDS = 180.0  # a node that says nothing for so long is ill
CLOCK_SECONDS = 1.0  # difference between nodes that is worth a warning
MARK = "NANOLADDER-DOCTOR "  # begins the line of a job's log that holds the result
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def examine_cluster(address: str, storage: str = "", *, measure: bool = True) -> list[Examination]:
    """Examine every node of the cluster at `address`: "auto" or host:port of its head where this machine belongs to it, else its
    dashboard's URL (then the doctor goes there as a job). Raises ConfigError where it cannot be reached."""
    if address.startswith(("http://", "https://")):
        return _as_job(address, storage, measure)
    from nanoladder.ray_init import ensure_ray, shutdown_ray

    ensure_ray(address=address)
    try:
        return _examine_nodes(storage, measure)
    finally:
        shutdown_ray()


def _examine_nodes(storage: str, measure: bool) -> list[Examination]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [n for n in ray.nodes() if n["Alive"]]
    free = ray._private.state.available_resources_per_node()
    pending: dict[Any, tuple[str, float]] = {}
    examinations: list[Examination] = []
    for node in nodes:
        name, total = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", node["Resources"].get("GPU", 0.0)
        spare = free.get(node["NodeID"], {}).get("GPU", 0.0)
        where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, num_gpus=spare, max_retries=0, scheduling_strategy=where)(_examine_node)  # type: ignore[call-overload]
        pending[task.remote(storage, measure)] = (name, time.time())
        if total > spare:
            finding = warning("devices", f"{total - spare:g} of {total:g} GPUs are in use and were not examined", "come back later")
            examinations.append(Examination(node=name, findings=(finding,)))
    clocks: dict[str, float] = {}
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=NODE_SECONDS)
    for reference in late:
        finding = error("node", f"it did not answer in {NODE_SECONDS:.0f} s", "look at its raylet's log, or take it out")
        examinations.append(Examination(node=pending[reference][0], findings=(finding,)))
    for reference in done:
        name, asked = pending[reference]
        try:
            plain, began, ended = ray.get(reference)
        except ray.exceptions.RayError as e:
            finding = error("node", f"the examination ended early: {str(e).strip().splitlines()[-1]}", "look at its raylet's log")
            examinations.append(Examination(node=name, findings=(finding,)))
            continue
        clocks[name] = outside(began, ended, asked, time.time())
        examinations.append(Examination(node=name, findings=Examination.from_dict(plain).findings))
    overall = [*_same(examinations), *_clocks(clocks), *_dashboard()]
    return [*examinations, Examination(node=f"cluster of {len(nodes)} nodes", findings=tuple(overall))]


def _examine_node(storage: str, measure: bool) -> tuple[dict[str, Any], float, float]:
    began = time.time()
    return examine(storage, measure=measure).as_dict(), began, time.time()


def outside(began: float, ended: float, asked: float, answered: float) -> float:
    """Seconds by which a node's clock must differ from ours: its times would lie between question and answer otherwise."""
    return max(asked - began, ended - answered, 0.0)


def _clocks(differences: dict[str, float]) -> list[Finding]:
    wrong = {name: seconds for name, seconds in differences.items() if seconds > CLOCK_SECONDS}
    if wrong:
        names = ", ".join(f"{name} by at least {seconds:.1f} s" for name, seconds in wrong.items())
        return [warning("clock", f"differs from the driver's: {names}", "run chrony or systemd-timesyncd on every node")]
    return [ok("clock", f"no node's differs by more than {CLOCK_SECONDS:g} s as far as can be told")]


def _same(examinations: Sequence[Examination]) -> list[Finding]:
    """Whether all nodes have the same Python and packages."""
    found: dict[str, dict[str, list[str]]] = {}
    for examination in examinations:
        for finding in examination.findings:
            if finding.check == "python" and "ray" in finding.facts:
                for key in ("python", "ray", "torch"):
                    version = str(finding.facts[key]).split("+")[0]  # CUDA and ROCm builds may live side by side
                    found.setdefault(key, {}).setdefault(version, []).append(examination.node)
    different = {key: versions for key, versions in found.items() if len(versions) > 1}
    if different:
        text = "; ".join(f"{key} is {' and '.join(sorted(versions))}" for key, versions in different.items())
        return [error("versions", f"nodes differ: {text}", "install the same constraints.txt on every node", **different)]
    return [ok("versions", ", ".join(f"{key} {next(iter(versions))}" for key, versions in found.items()) + " on every node")]


def _dashboard() -> list[Finding]:
    import ray

    url = ray._private.worker.get_dashboard_url() or ""
    findings = []
    if url and url.rsplit(":", 1)[0] not in LOOPBACK:
        remedy = "start the head with --dashboard-host=127.0.0.1 and open a tunnel (ray dashboard cluster.yaml)"
        findings.append(error("dashboard", f"listens at {url}, outside the loopback", remedy))
    elif url:
        findings.append(ok("dashboard", f"on the loopback of its head ({url})"))
    if os.environ.get("RAY_AUTH_MODE") != "token":
        remedy = "ray get-auth-token --generate, the same file on every node, RAY_AUTH_MODE=token where `ray start` runs"
        findings.append(error("authentication", "this cluster runs without tokens: whoever reaches it can run code", remedy))
    else:
        findings.append(ok("authentication", "tokens are on (RAY_AUTH_MODE=token)"))
    return findings


def _as_job(address: str, storage: str, measure: bool) -> list[Examination]:
    from nanoladder.ray_init import package_dirs
    from nanoladder.submit import connect, find_runtime_env, follow, load_runtime_env, new_job_id, refusals, use_token

    use_token()
    env = load_runtime_env(find_runtime_env(package_dirs()[-1] / "x"))
    options = (["--storage", storage] if storage else []) + ([] if measure else ["--quick"])
    entrypoint = shlex.join(["python", "-m", "nanoladder.doctor_job", *options])
    log: list[str] = []
    with refusals(address):
        client = connect(address)
        metadata = {"job_name": "doctor"}
        job_id = client.submit_job(entrypoint=entrypoint, runtime_env=env, metadata=metadata, submission_id=new_job_id("doctor"))
        follow(client, job_id, log.append)
    lines = [line for line in "".join(log).splitlines() if line.startswith(MARK)]
    if not lines:
        raise ConfigError(f"the doctor's job {job_id} at {address} ended without a result: {' '.join(log[-1:])[-300:]}")
    return [Examination.from_dict(plain) for plain in json.loads(lines[-1].removeprefix(MARK))]
