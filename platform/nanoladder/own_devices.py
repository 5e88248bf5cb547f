"""Which GPUs a process that Ray started may see, where Ray was told not to hide the others.

Nodes with AMD GPUs are started with RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES: workers of Ray Train on one node need to see each
other's GPUs (ray-project/ray#49260). A trial in a process of its own would then take the node's first GPU, as all others do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

HIDES = {  # what Ray reads -> what it then leaves alone
    "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "HIP_VISIBLE_DEVICES",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "CUDA_VISIBLE_DEVICES",
}


def see_own_devices() -> None:
    """In a Ray actor or task: see the GPUs that Ray gave it, and no others. Call before torch first looks for GPUs."""
    import ray

    hide_others(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


def hide_others(ids: Sequence[str]) -> None:
    """Make `ids` the visible GPUs where Ray did not; nothing where this process was given none."""
    for told, variable in HIDES.items():
        if ids and os.environ.get(told, "").lower() in ("1", "true"):
            os.environ[variable] = ",".join(ids)
