"""One training step on this device, to see what it takes. Needs no data."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochat_model import device as devices
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.distributed import Ranks
from nanochat_model.loop import Batch, Multipliers
from nanochat_model.out_of_memory import is_out_of_memory, release_memory
from nanochat_model.session import build_stepper, choose_micro_batch_rows


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one step took. `micro_batch_rows` is 0 where not even one row fits."""

    micro_batch_rows: int
    peak_bytes: float  # of the accelerator, its context included; of the whole process on a CPU
    device_bytes: float | None  # the accelerator's memory; None for a CPU
    device: str


def probe_step(config: TrainConfig, runtime: RuntimeConfig) -> Probe:
    """Forward, backward and update on one micro-batch of random tokens, halving the micro-batch while it does not fit.

    The peak is that of training: the optimizer's states and the gradients are there from the start. Raises ConfigError for
    what `build_session` would refuse, and whatever else a step may raise.
    """
    device = devices.choose_device(runtime.device)
    rows = choose_micro_batch_rows(config, runtime, Ranks(), device)
    while rows > 0:
        try:
            return _probe(config, replace(runtime, micro_batch_rows=rows))
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        release_memory()
        rows //= 2
    return Probe(
        micro_batch_rows=0,
        peak_bytes=float("inf"),
        device_bytes=devices.memory_bytes(device),
        device=devices.device_name(device),
    )


def _probe(config: TrainConfig, runtime: RuntimeConfig) -> Probe:
    _, _, stepper, device = build_stepper(config, runtime, Ranks())
    shape = (stepper.micro_batch_rows, config.model.sequence_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    batch = Batch(inputs=tokens, targets=np.roll(tokens, -1, axis=1), num_targets=tokens.size)
    stepper.step(batch, Multipliers(lr=1.0, momentum=0.9, weight_decay=0.0))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peak = devices.peak_memory(device)
    return Probe(
        micro_batch_rows=stepper.micro_batch_rows,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 if peak is None else peak + devices.CONTEXT_BYTES,
        device_bytes=devices.memory_bytes(device),
        device=devices.device_name(device),
    )
