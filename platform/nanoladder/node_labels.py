"""Which nodes a sweep's device means: by the label `gpu` that nodes are started with (`ray start --labels gpu=h100`).

Labels of our own, because Ray's accelerator constants depend on what a driver says: the MI300X's virtual function has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat_model.errors import ConfigError

LABEL = "gpu"
LAUNCHER_FILE = Path("~/ray_bootstrap_config.yaml")  # on the head of a cluster that `ray up` started: its cluster file


def present_gpus() -> frozenset[str]:
    """Labels of the nodes that are alive; needs a connection to Ray."""
    import ray

    return frozenset(n["Labels"][LABEL].lower() for n in ray.nodes() if n["Alive"] and LABEL in (n.get("Labels") or {}))


def resources_of_nodes(labels: Mapping[str, str]) -> dict[str, float]:
    """Resources of all living nodes that carry `labels`; of the whole cluster where there are none."""
    import ray

    if not labels:
        return dict(ray.cluster_resources())
    total: dict[str, float] = {}
    for node in ray.nodes():
        carried = node.get("Labels") or {}
        if node["Alive"] and all(carried.get(k, "").lower() == v.lower() for k, v in labels.items()):
            for key, value in node["Resources"].items():
                total[key] = total.get(key, 0.0) + value
    return total


def coming_gpus(path: Path = LAUNCHER_FILE) -> frozenset[str]:
    """Labels of the nodes that the launcher may yet start, known on its head; none elsewhere."""
    path = path.expanduser()
    if not path.is_file():
        return frozenset()
    import yaml

    types = (yaml.safe_load(path.read_text(encoding="utf8")) or {}).get("available_node_types") or {}
    grow = [t for t in types.values() if LABEL in (t.get("labels") or {}) and t.get("max_workers", 1) > 0]
    return frozenset(t["labels"][LABEL].lower() for t in grow)


@dataclass(frozen=True, kw_only=True)
class NodeLabels:
    """The kinds of GPU of a cluster, of the nodes that are there and of those that may come."""

    present: frozenset[str] = frozenset()
    coming: frozenset[str] = frozenset()

    def selector(self, device: str) -> dict[str, str]:
        """What a trial for `device` asks of its nodes: {} for CPUs and where no node has a label. ConfigError where all that have
        one are of another kind."""
        wanted, known = device.lower(), self.present | self.coming
        if wanted in ("", "cpu") or not known:
            return {}
        if wanted not in known:
            raise ConfigError(
                f"no node for device {device!r}: the cluster labels gpu={', '.join(sorted(known))}; start one with --labels "
                f"gpu={wanted}, or --set device={sorted(known)[0]}"
            )
        return {LABEL: wanted}


NO_LABELS = NodeLabels()
