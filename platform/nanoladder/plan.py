"""What a run will be, take, cost and reach, before a device is rented. Arithmetic and laws only: no torch, no Ray."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from analysis.words import BITS_PER_BYTE
from nanochat_model.config import DataConfig, GPTConfig, TrainConfig
from nanochat_model.counts import ParamCounts, count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import find_device
from nanochat_model.horizon import Horizon
from nanochat_model.memory import FP32, MemoryEstimate, choose_micro_batch_rows, estimate_memory
from nanochat_model.recipe import NANOCHAT, Recipe, erasing_decay
from nanochat_model.record import RunRecord
from nanoladder.laws_to_recipe import PREDICTION, LawRecipe, Laws, RuleUse, convention_of, optimal_horizon, recipe_from_laws
from nanoladder.target import Target
from nanoladder.throughput import Throughput, all_reduce_seconds, estimate_throughput

CPU_MEMORY_BYTES = 8e9  # when the device is not in the table: what a run may use is then an assumption
BYTES_PER_TOKEN = 4.8  # of English web text at V = 32768 (nanochat's tokenizer report); measured shards replace it
SHARD_BYTES = 250e6  # characters in one shard of nanochat's ClimbMix set, about 100 MB compressed
EMBEDDING_SHARE_WARNING = 0.5  # embeddings above this share: the loss says little about larger models
KEPT_BY_BEST_FIT = 0.65  # of the tokens of a web corpus at T = 2048; the rest is cut off and dropped (nanochat's log)
GIVEN_BY = {"batch_size": "batch_tokens", "learning_rate": "optimizer.matrix_lr", "weight_decay": "optimizer.weight_decay"}


@dataclass(frozen=True, kw_only=True)
class LossPrediction:
    """Predicted loss of one run, seed noise included, in the unit of the runs that the laws were fitted to (`loss_name`). `low`
    and `high` are null where the laws allow no interval; verdict: ok, warn or refuse."""

    loss: float
    low: float | None
    high: float | None
    surface_loss: float | None
    level: float | None
    extrapolation: float | None  # compute over the largest fitted compute
    verdict: str
    reasons: tuple[str, ...] = ()
    loss_name: str = BITS_PER_BYTE


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
    overrides: Mapping[str, Any] = MappingProxyType({}),
    seed: int = 0,
    accept: Collection[str] = (),
    without: Collection[str] = (),
    depth_solved: bool = False,
) -> LaunchPlan:
    """The plan of one run of `model`.

    The horizon is the given one, else the compute-optimal tokens of a good allocation law, else the recipe's ratio.
    `depth_solved`: the model was chosen for this horizon (`solve_goal`), which the plan then says.
    Raises ConfigError on what a user can mend: an unknown law or override, a row that fits no card, an MFU over 100%.
    """
    target = target or Target()
    resolved = recipe_from_laws(laws, recipe, accept=accept, without=without)
    if horizon is not None:
        name, value = next((k, v) for k, v in vars(horizon).items() if v is not None)
        by = f"; depth by {resolved.use('allocation').source}" if depth_solved else ""
        resolved = resolved.given("allocation", f"{name} {value:.6g}{by}")
    elif resolved.allocation is not None:
        horizon = optimal_horizon(resolved.allocation, model)
    for quantity, key in GIVEN_BY.items():
        if key in overrides:
            resolved = resolved.given(quantity, f"{key} {overrides[key]}")
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
    """The plan of a finished TrainConfig. Raises ConfigError on a batch that does not divide or fits no card."""
    counts, per_token = count_params(config.model), flops_per_token(config.model)
    card = _card(config, target)
    speed, time = run_time(config, target, records)
    prediction = predict(resolved.predictor, config)
    refused = [] if resolved.accepts_prediction else _refused_prediction(prediction)
    return LaunchPlan(
        config=config,
        params=counts,
        tokens_per_param=config.num_tokens / counts.scaling,
        flops_per_token=per_token,
        train_flops=float(per_token) * config.num_tokens,
        target=target,
        throughput=speed,
        prediction=prediction,
        recipe=resolved.recipe.name,
        uses=resolved.uses,
        blocking=(*resolved.blocking, *refused, *_erasing_decay(config)),
        warnings=tuple(_warnings(counts, speed, prediction, time, config, refused=bool(refused))),
        **card,
        **time,
        **_sizes(config, card["memory"], target, bytes_per_token),
    )


def _card(config: TrainConfig, target: Target) -> dict[str, Any]:
    """How a batch is spread over the devices, and what it takes of a card's memory."""
    model, spec = config.model, find_device(target.device)
    capacity = spec.memory_bytes if spec else CPU_MEMORY_BYTES
    rows, rest = divmod(config.rows_per_batch, target.num_devices)
    if rest:
        nearest = max(1, round(config.rows_per_batch / target.num_devices)) * target.num_devices * model.sequence_len
        raise ConfigError(
            f"a batch of {config.rows_per_batch} rows does not divide over {target.num_devices} devices; "
            f"nearest batch_tokens: {nearest} (--set batch_tokens={nearest})"
        )
    shared: dict[str, Any] = {"compute_dtype": config.compute_dtype, "num_devices": target.num_devices}
    micro = choose_micro_batch_rows(model, rows_per_device=rows, memory_bytes=capacity, **shared)
    return {
        "micro_batch_rows": micro,
        "accumulation_steps": rows // micro,
        "memory": estimate_memory(model, micro_batch_rows=micro, fixed_bytes=1.5e9 if spec else 0.3e9, **shared),
        "memory_bytes": capacity,
        "memory_known": spec is not None,
    }


def run_time(config: TrainConfig, target: Target, records: Sequence[RunRecord] = ()) -> tuple[Throughput, dict[str, Any]]:
    """Speed of the devices; seconds of a step, with and for the network, hours and dollars (fields of LaunchPlan). A speed
    measured over all devices, or recorded over several nodes, has the network in it already."""
    speed = estimate_throughput(
        config.model,
        target.device,
        num_devices=target.num_devices,
        records=records,
        mfu=target.mfu,
        tokens_per_second=target.tokens_per_second,
        precision="bf16" if config.fp8 == "off" else "fp8",
        devices_per_node=target.devices_per_node,
    )
    gradients = float(FP32 * count_params(config.model).total)
    network = all_reduce_seconds(gradients, num_nodes=target.num_nodes, bandwidth_bytes=target.network_bytes_per_second)
    added = 0.0 if speed.includes_network else network
    step_seconds = config.batch_tokens / speed.tokens_per_second + added
    hours = step_seconds * config.num_steps / 3600
    price = target.price_per_device_hour
    return speed, {
        "gradient_bytes": gradients,
        "all_reduce_seconds": network,
        "step_seconds": step_seconds,
        "hours": hours,
        "dollars": None if price is None else hours * target.num_devices * price,
    }


def _sizes(config: TrainConfig, memory: MemoryEstimate, target: Target, bytes_per_token: float) -> dict[str, Any]:
    """Bytes on disk: checkpoint, training text, token shards."""
    kept = KEPT_BY_BEST_FIT if config.data.packing == "best_fit" else 1.0
    text_bytes = config.num_tokens * bytes_per_token / kept
    return {
        "checkpoint_bytes": memory.parameters + memory.optimizer * target.num_devices,
        "data_bytes": text_bytes,
        "data_shards": -(-int(text_bytes) // int(SHARD_BYTES)) + 1,  # and one for validation
        "token_bytes": config.num_tokens / kept * (2 if config.model.vocab_size <= 1 << 16 else 4),
    }


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
        loss=p.value,
        low=low,
        high=high,
        surface_loss=p.surface_value,
        level=p.level,
        extrapolation=p.extrapolation,
        verdict=p.verdict,
        reasons=tuple(p.reasons),
        loss_name=allocation.get("loss_name", BITS_PER_BYTE),
    )


def _warnings(
    counts: ParamCounts,
    speed: Throughput,
    prediction: LossPrediction | None,
    time: Mapping[str, Any],
    config: TrainConfig,
    *,
    refused: bool,
) -> list[str]:
    lines = []
    network, compute_seconds = time["all_reduce_seconds"], config.batch_tokens / speed.tokens_per_second
    if counts.embedding_share > EMBEDDING_SHARE_WARNING:
        lines.append(f"embeddings are {counts.embedding_share:.0%} of the parameters: this loss says little about larger models")
    if not speed.measured:
        lines.append(f"speed is {speed.source}; --tokens-per-second or recorded runs on the device give a better figure")
    if network > 0.2 * compute_seconds:
        lines.append(f"averaging gradients takes {network:.2f} s a step over this network, computing {compute_seconds:.2f} s")
    if prediction is None:
        lines.append("no loss is predicted: no usable allocation law")
    elif prediction.verdict != "ok" and not refused:
        lines += [f"prediction: {reason}" for reason in prediction.reasons] or [f"prediction: verdict {prediction.verdict}"]
    if prediction is not None and prediction.loss_name != BITS_PER_BYTE:
        lines.append(
            f"the laws' loss is {prediction.loss_name!r} of the table they were fitted to, a run measures bits per byte: its "
            "result will not be held against the prediction"
        )
    if config.num_steps < 100:
        lines.append(f"{config.num_steps} steps are few: warm-up alone takes {config.schedule.warmup_steps}; take a smaller batch")
    return lines


def _refused_prediction(prediction: LossPrediction | None) -> list[str]:
    """Laws that refuse to speak about a run say that nobody knows what it will reach: not to be paid for unseen."""
    if prediction is None or prediction.verdict != "refuse":
        return []
    return [
        f"prediction of {prediction.loss_name} {prediction.loss:.4f} has verdict 'refuse' ({'; '.join(prediction.reasons)}); plan "
        f"within reach of the laws, go on in spite of it with --accept-law {PREDICTION}, or predict nothing with "
        "--without-law allocation"
    ]


def _erasing_decay(config: TrainConfig) -> list[str]:
    """A rule carried far from where it was measured may ask for a decay that leaves nothing of the weights: no run to launch."""
    problem = erasing_decay(config)
    return [f"{problem} (--recipe), or fit a weight-decay law"] if problem else []
