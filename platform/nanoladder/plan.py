"""What a run will be, take, cost and reach, before a device is rented. Arithmetic and laws only: no torch, no Ray."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_model.config import DataConfig, GPTConfig, TrainConfig
from nanochat_model.counts import ParamCounts, count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import find_device
from nanochat_model.horizon import Horizon
from nanochat_model.memory import FP32, MemoryEstimate, choose_micro_batch_rows, estimate_memory
from nanochat_model.recipe import NANOCHAT, Recipe
from nanochat_model.record import RunRecord
from nanoladder.laws_to_recipe import LawRecipe, Laws, RuleUse, convention_of, optimal_horizon, recipe_from_laws
from nanoladder.throughput import Throughput, all_reduce_seconds, estimate_throughput

CPU_MEMORY_BYTES = 8e9  # when the device is not in the table: what a run may use is then an assumption
DEVICES_PER_NODE = 8
BYTES_PER_TOKEN = 4.8  # of English web text at V = 32768 (nanochat's tokenizer report); measured shards replace it
SHARD_BYTES = 250e6  # characters in one shard of nanochat's ClimbMix set, about 100 MB compressed
EMBEDDING_SHARE_WARNING = 0.5  # embeddings above this share: the loss says little about larger models
KEPT_BY_BEST_FIT = 0.65  # of the tokens of a web corpus at T = 2048; the rest is cut off and dropped (nanochat's log)
MAX_SHRINK = 0.05  # of the weights, by decay alone, in one step at the peak rate: 20 steps then forget everything


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a run is to take place, and at what price."""

    device: str = "h100"
    num_devices: int = 1
    price_per_device_hour: float | None = None  # dollars
    network_bytes_per_second: float = 1.25e10  # between nodes: 100 Gb/s Ethernet or one InfiniBand port
    devices_per_node: int = DEVICES_PER_NODE
    mfu: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ConfigError(f"num_devices {self.num_devices} must be at least 1")
        if self.price_per_device_hour is not None and not 0 <= self.price_per_device_hour < float("inf"):
            raise ConfigError(f"price {self.price_per_device_hour} must be 0 or more dollars a device and hour")

    @property
    def num_nodes(self) -> int:
        return -(-self.num_devices // self.devices_per_node)


@dataclass(frozen=True, kw_only=True)
class LossPrediction:
    """Predicted bpb of one run, seed noise included. `low` and `high` are null where the laws allow no interval; verdict: ok,
    warn or refuse."""

    val_bpb: float
    low: float | None
    high: float | None
    surface_bpb: float | None
    level: float | None
    extrapolation: float | None  # compute over the largest fitted compute
    verdict: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """Everything `nanoladder plan` shows and `nanoladder launch` runs."""

    config: TrainConfig
    params: ParamCounts
    tokens_per_param: float
    flops_per_token: int
    train_flops: float
    micro_batch_rows: int  # rows of one forward pass on one device
    accumulation_steps: int
    target: Target
    throughput: Throughput
    hours: float
    dollars: float | None
    memory: MemoryEstimate
    memory_bytes: float  # of the card
    memory_known: bool
    gradient_bytes: float
    all_reduce_seconds: float  # a step, between nodes, not overlapped
    step_seconds: float
    checkpoint_bytes: float  # model, and optimizer states
    data_bytes: float  # of training text, so that no document is read twice
    data_shards: int
    token_bytes: float  # of the token shards made from it
    recipe: str  # whose rules fill in where there is no law
    prediction: LossPrediction | None
    uses: tuple[RuleUse, ...]
    blocking: tuple[str, ...]
    warnings: tuple[str, ...] = field(default=())


def make_plan(
    model: GPTConfig,
    *,
    horizon: Horizon | None = None,
    laws: Laws | None = None,
    recipe: Recipe = NANOCHAT,
    target: Target | None = None,
    records: Sequence[RunRecord] = (),
    data: DataConfig | None = None,
    bytes_per_token: float = BYTES_PER_TOKEN,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    accept: Collection[str] = (),
    without: Collection[str] = (),
) -> LaunchPlan:
    """The plan of one run of `model`.

    The horizon is the given one, else the compute-optimal tokens of a good allocation law, else the recipe's ratio.
    Raises ConfigError on what a user can mend: an unknown law or override, a row that fits no card, an MFU over 100%.
    """
    target = target or Target()
    resolved = recipe_from_laws(laws, recipe, accept=accept, without=without)
    if horizon is None and resolved.allocation is not None:
        horizon = optimal_horizon(resolved.allocation, model)
    config = resolved.recipe.resolve(model, horizon, data=data, seed=seed, overrides=overrides)
    return plan_config(config, resolved=resolved, target=target, records=records, bytes_per_token=bytes_per_token)


def plan_config(
    config: TrainConfig,
    *,
    resolved: LawRecipe,
    target: Target,
    records: Sequence[RunRecord] = (),
    bytes_per_token: float = BYTES_PER_TOKEN,
) -> LaunchPlan:
    """The plan of a finished TrainConfig."""
    model = config.model
    counts, per_token = count_params(model), flops_per_token(model)
    spec = find_device(target.device)
    capacity = spec.memory_bytes if spec else CPU_MEMORY_BYTES
    rows = config.rows_per_batch / target.num_devices
    if rows != int(rows):
        raise ConfigError(
            f"a batch of {config.rows_per_batch} rows does not divide over {target.num_devices} devices; nearest batch_tokens: "
            f"{max(1, round(rows)) * target.num_devices * model.sequence_len}"
        )
    micro = choose_micro_batch_rows(
        model,
        rows_per_device=int(rows),
        memory_bytes=capacity,
        compute_dtype=config.compute_dtype,
        num_devices=target.num_devices,
    )
    speed = estimate_throughput(
        model,
        target.device,
        num_devices=target.num_devices,
        records=records,
        mfu=target.mfu,
        tokens_per_second=target.tokens_per_second,
        precision="bf16" if config.fp8 == "off" else "fp8",
    )
    memory = estimate_memory(
        model,
        micro_batch_rows=micro,
        compute_dtype=config.compute_dtype,
        num_devices=target.num_devices,
        fixed_bytes=1.5e9 if spec else 0.3e9,
    )
    gradients = float(FP32 * counts.total)
    network = all_reduce_seconds(gradients, num_nodes=target.num_nodes, bandwidth_bytes=target.network_bytes_per_second)
    compute_seconds = config.batch_tokens / speed.tokens_per_second
    step_seconds = compute_seconds + (0.0 if target.tokens_per_second is not None else network)
    hours = step_seconds * config.num_steps / 3600
    kept = KEPT_BY_BEST_FIT if config.data.packing == "best_fit" else 1.0
    text_bytes = config.num_tokens * bytes_per_token / kept
    prediction = predict(resolved.predictor, config)
    return LaunchPlan(
        config=config,
        params=counts,
        tokens_per_param=config.num_tokens / counts.scaling,
        flops_per_token=per_token,
        train_flops=float(per_token) * config.num_tokens,
        micro_batch_rows=micro,
        accumulation_steps=int(rows) // micro,
        target=target,
        throughput=speed,
        hours=hours,
        dollars=None if target.price_per_device_hour is None else hours * target.num_devices * target.price_per_device_hour,
        memory=memory,
        memory_bytes=capacity,
        memory_known=spec is not None,
        gradient_bytes=gradients,
        all_reduce_seconds=network,
        step_seconds=step_seconds,
        checkpoint_bytes=memory.parameters + memory.optimizer * target.num_devices,
        data_bytes=text_bytes,
        data_shards=-(-int(text_bytes) // int(SHARD_BYTES)) + 1,  # and one for validation
        prediction=prediction,
        token_bytes=config.num_tokens / kept * (2 if model.vocab_size <= 1 << 16 else 4),
        recipe=resolved.recipe.name,
        uses=resolved.uses,
        blocking=(*resolved.blocking, *_erasing_decay(config)),
        warnings=tuple(_warnings(counts, speed, prediction, network, compute_seconds, config, records)),
    )


def predict(allocation: Mapping[str, Any] | None, config: TrainConfig) -> LossPrediction | None:
    """Loss of `config` from the allocation laws; null without them."""
    if allocation is None or not allocation.get("predictor"):
        return None
    from analysis.allocation import predict_from_block

    counts = count_params(config.model)
    p = predict_from_block(
        allocation,
        target_C=float(flops_per_token(config.model)) * config.num_tokens,
        target_N=float(counts.by_convention(convention_of(allocation))),
        target_D=float(config.num_tokens),
    )
    low, high = p.run_interval if p.run_interval is not None else (None, None)
    return LossPrediction(
        val_bpb=p.value,
        low=low,
        high=high,
        surface_bpb=p.surface_value,
        level=p.level,
        extrapolation=p.extrapolation,
        verdict=p.verdict,
        reasons=tuple(p.reasons),
    )


def _warnings(
    counts: ParamCounts,
    speed: Throughput,
    prediction: LossPrediction | None,
    network: float,
    compute_seconds: float,
    config: TrainConfig,
    records: Sequence[RunRecord],
) -> list[str]:
    lines = []
    if counts.embedding_share > EMBEDDING_SHARE_WARNING:
        lines.append(f"embeddings are {counts.embedding_share:.0%} of the parameters: this loss says little about larger models")
    if not speed.measured:
        lines.append(f"speed is {speed.source}; --tokens-per-second or recorded runs on the device give a better figure")
    if network > 0.2 * compute_seconds:
        lines.append(f"averaging gradients takes {network:.1f} s of a {compute_seconds:.1f} s step over this network")
    if prediction is None:
        lines.append("no loss is predicted: no usable allocation law")
    elif prediction.verdict != "ok":
        lines += [f"prediction: {reason}" for reason in prediction.reasons] or [f"prediction: verdict {prediction.verdict}"]
    if config.num_steps < 100:
        lines.append(f"{config.num_steps} steps are few: warm-up alone takes {config.schedule.warmup_steps}; take a smaller batch")
    return lines


def _erasing_decay(config: TrainConfig) -> list[str]:
    """A rule carried far from where it was measured may ask for a decay that leaves nothing of the weights: no run to launch."""
    shrink = config.optimizer.matrix_lr * config.optimizer.weight_decay
    if shrink <= MAX_SHRINK:
        return []
    return [
        f"learning rate × weight decay is {shrink:.2g} a step, the weights would be gone in a few: {config.num_tokens:.3g} tokens "
        "are far from where this rule holds; start from a recipe or run of this scale (--recipe), fit a weight-decay law, or set "
        "optimizer.weight_decay"
    ]
