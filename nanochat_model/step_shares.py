"""What the seconds of a step's parts say: in a line, and as the likely cause of a low MFU. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FAR_BELOW = 0.8  # of the recorded runs' MFU; seeds, batches and hosts of one device spread over some percent
LOW_MFU = 0.40  # under this a GPU run is told why; nanochat reaches 41% at d12 on H100s
SMALL_MICRO_BATCH_TOKENS = 16384  # below it matmuls of a small model do not fill a GPU
STRAGGLING = 1.15  # times the fastest rank's computation: more is no chance
PARTS = ("data", "compute", "wait", "communication", "optimizer")


def describe_startup(seconds: Mapping[str, float]) -> str:
    """How long the first step took, in one line."""
    parts = ", ".join(f"{part.replace('_', ' ')} {value:.1f}" for part, value in seconds.items())
    return f"first step done after {sum(seconds.values()):.1f} s ({parts})"


def describe_times(seconds: Mapping[str, float], compute_by_rank: Sequence[float] = ()) -> str:
    """The share of each part of a step, and the straggler among several ranks, in one line; "" where nothing was timed."""
    total = sum(seconds.values())
    if total <= 0:
        return ""
    parts = [f"{part} {share:.0%}" for part in PARTS if (share := seconds.get(part, 0.0) / total) >= 0.005]
    if len(compute_by_rank) > 1:
        slow, fast = max(compute_by_rank), min(compute_by_rank)
        behind = f" (+{slow / fast - 1:.0%} on the fastest)" if fast > 0 else ""
        parts.append(f"slowest rank {compute_by_rank.index(slow)}{behind}")
    return ", ".join(parts)


def is_low(mfu: float, usual_mfu: float) -> bool:
    """Whether an MFU calls for an explanation: under 40%, or far below that of recorded runs on this device (0: none known)."""
    return mfu < LOW_MFU or mfu < FAR_BELOW * usual_mfu


def likely_cause(
    seconds: Mapping[str, float],
    compute_by_rank: Sequence[float] = (),
    *,
    micro_batch_tokens: int,
    attention: str,
    windowed: bool,
    mfu: float = 0.0,
    usual_mfu: float = 0.0,
) -> str:
    """The most likely reason for a low MFU, from the seconds of a step's PARTS, with the remedy, in one line. `usual_mfu`: of
    recorded runs on this device, 0 where none is known."""
    total = sum(seconds.values())
    if total <= 0:
        return "no step was measured"

    def share(part: str) -> float:
        return seconds.get(part, 0.0) / total

    slow, fast = max(compute_by_rank, default=0.0), min(compute_by_rank, default=0.0)
    if share("data") > 0.1:
        return f"waiting for data takes {share('data'):.0%} of a step; put the shards on a local disk"
    if slow > STRAGGLING * fast > 0:
        rank = compute_by_rank.index(slow)
        return f"rank {rank} needs {slow:.3g} s for what the fastest does in {fast:.3g} s, and all wait for it; look at that device"
    if share("communication") > 0.2:
        return f"communication takes {share('communication'):.0%} of a step; raise the batch, or use fewer or closer devices"
    if windowed and attention == "sdpa":
        return "attention falls back to sdpa, which has no windows; install a kernel that has them, or use window_pattern L"
    if share("optimizer") > 0.25:
        return f"the optimizer takes {share('optimizer'):.0%} of a step; the batch is small for this model, raise batch_tokens"
    if micro_batch_tokens < SMALL_MICRO_BATCH_TOKENS:
        return f"a micro-batch of {micro_batch_tokens} tokens is too small to fill the device; raise micro_batch_rows"
    if mfu < FAR_BELOW * usual_mfu:
        return (
            f"recorded runs on this device reach {usual_mfu:.0%}, and no part of the step stands out; look at its clock, its "
            "temperature and other programs on it"
        )
    return f"none stands out: {share('compute'):.0%} of a step is computation; the model may be too narrow for this device"
