"""nanoladder plan and nanoladder launch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import tyro

from nanochat_model.config import DataConfig, GPTConfig, Packing
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import require_device
from nanochat_model.horizon import Horizon
from nanochat_model.overrides import parse_overrides
from nanoladder.cli.common import Json, Overrides, Storage, print_json
from nanoladder.plan import BYTES_PER_TOKEN, LaunchPlan, make_plan
from nanoladder.plan_backwards import Goal, solve_goal
from nanoladder.plan_text import plan_as_dict, print_plan
from nanoladder.recipes import find_recipe
from nanoladder.target import DeviceOptions
from nanoladder.throughput import flops_mistake, mfu_mistake
from nanoladder.workspace import Workspace

if TYPE_CHECKING:
    from nanochat_model.record import RunRecord
    from nanoladder.launch import LaunchOptions

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAW ...")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    depth: int | None = None
    """Layers; left out: solved from a budget, a target or FLOPs."""
    vocab_size: int = 0
    """Vocabulary; 0: that of the storage root's tokenizer, else 32768."""
    sequence_len: int = 2048
    window_pattern: str = "SSSL"
    aspect_ratio: int = 64
    """Width per layer, rounded up to whole heads."""
    head_dim: int = 128

    def shape(self, vocab_size: int) -> dict[str, Any]:
        """Arguments of GPTConfig.from_depth besides the depth."""
        return {
            "vocab_size": self.vocab_size or vocab_size,
            "sequence_len": self.sequence_len,
            "window_pattern": self.window_pattern,
            "aspect_ratio": self.aspect_ratio,
            "head_dim": self.head_dim,
        }


@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """Solve backwards from one of these (or, with --depth, take FLOPs as the horizon)."""

    budget_dollars: float | None = None
    """Needs --price."""
    budget_hours: float | None = None
    """Hours on all devices together."""
    target_bpb: float | None = None
    """Wanted validation loss; needs --laws."""
    flops: float | None = None
    """Training FLOPs."""
    num_tokens: float | None = None
    """With --depth: training tokens."""
    tokens_per_param: float | None = None
    """With --depth: training tokens per parameter (matrices + lm_head)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parameters, tokens, batch, rates, FLOPs, predicted loss, memory, time and cost of a run, each with its source.

    Example: nanoladder plan --depth 24 --laws laws.json --device mi300x --num-devices 1 --price 2.0

    Backwards: nanoladder plan --budget-dollars 100 --device h100 --num-devices 8 --price 3.0
    """

    laws: str = ""
    """laws.json of `nanoladder fit`; left out: the recipe's rules."""
    recipe: str = ""
    """nanochat, demo, a recipe file, or a run's folder; left out: recipe.json beside the laws, else nanochat."""
    packing: str = ""
    """keep_remainder or best_fit (nanochat's, which drops about 35% of a web corpus); left out: keep_remainder with --storage,
    else best_fit. Losses under different packings are not comparable."""
    claimed_flops: float | None = None
    """Training FLOPs that somebody states for this run: says which mistake they hold, if one."""
    claimed_mfu: float | None = None
    """With --tokens-per-second: a stated MFU (share) to check."""
    storage: Storage = ""
    """Root folder whose runs tell the speed and whose shards tell the vocabulary."""
    model: ModelOptions = field(default_factory=ModelOptions)
    goal: GoalOptions = field(default_factory=GoalOptions)
    target: DeviceOptions = field(default_factory=DeviceOptions)
    accept_law: Names = ()
    """Use these laws in spite of their status; "prediction": launch in spite of a loss prediction's verdict refuse."""
    without_law: Names = ()
    """Use the recipe's own rules instead of these laws."""
    set: Overrides = ()
    json: Json = False

    def run(self) -> int:
        plan = self.plan()
        checks = self.checks(plan)
        if self.json:
            print_json({**plan_as_dict(plan), "checks": checks})
        else:
            print_plan(plan)
            for line in checks:
                print(f"check: {line}")
        return 0

    def checks(self, plan: LaunchPlan) -> list[str]:
        """What is wrong, or right, with numbers that somebody stated for this run."""
        lines = []
        if self.claimed_flops is not None:
            right = f"this run takes {plan.train_flops:.3g} FLOPs"
            name = flops_mistake(plan.config.model, self.claimed_flops / plan.config.num_tokens)
            if abs(self.claimed_flops / plan.train_flops - 1) < 0.03:
                lines.append(f"{self.claimed_flops:.3g} FLOPs agree: {right}")
            else:
                lines.append(f"{self.claimed_flops:.3g}: {f'counted as {name}' if name else 'no known miscount gives it'}; {right}")
        if self.claimed_mfu is not None:
            if self.target.tokens_per_second is None:
                raise ConfigError("claimed_mfu needs the speed it was computed from; give --tokens-per-second")
            spec, model = require_device(self.target.device), plan.config.model
            found = mfu_mistake(model, self.claimed_mfu, self.target.tokens_per_second, spec, num_devices=self.target.num_devices)
            lines.append(found or f"MFU {self.claimed_mfu:.1%} agrees")
        return lines

    def plan(self) -> LaunchPlan:
        """The plan that the options describe."""
        from nanoladder.laws_to_recipe import recipe_from_laws

        records, data, vocab, bytes_per_token = self.known()
        laws = read_laws(self.laws)
        target, overrides = self.target.target(), parse_overrides(self.set)
        recipe = find_recipe(self.recipe, self.laws)
        resolved = recipe_from_laws(laws, recipe, accept=self.accept_law, without=self.without_law)
        shape = self.model.shape(vocab)
        horizon = self.horizon()
        if self.model.depth is not None:
            model = GPTConfig.from_depth(self.model.depth, **shape)
        else:
            if horizon is not None and self.goal.flops is None:
                raise ConfigError(
                    "num_tokens and tokens_per_param need --depth; without a depth give a budget, --target-bpb or --flops"
                )
            model, flops = solve_goal(
                self.goal_of(),
                target=target,
                resolved=resolved,
                model_args=shape,
                records=records,
                data=data,
                overrides=overrides,
            )
            horizon = Horizon(train_flops=flops)
        return make_plan(
            model,
            horizon=horizon,
            laws=laws,
            recipe=recipe,
            target=target,
            records=records,
            data=data,
            bytes_per_token=bytes_per_token,
            overrides=overrides,
            accept=self.accept_law,
            without=self.without_law,
            depth_solved=self.model.depth is None,
        )

    def horizon(self) -> Horizon | None:
        """The horizon that was given with a depth."""
        g = self.goal
        given = (g.num_tokens, g.tokens_per_param, g.flops)
        backwards = [k for k in ("budget_dollars", "budget_hours", "target_bpb") if getattr(g, k) is not None]
        if self.model.depth is not None and backwards:
            raise ConfigError(f"--depth and --{backwards[0].replace('_', '-')} both fix the size; give one of them")
        if given == (None, None, None):
            return None
        return Horizon(num_tokens=g.num_tokens, tokens_per_param=g.tokens_per_param, train_flops=g.flops)

    def goal_of(self) -> Goal:
        g = self.goal
        if (g.flops, g.budget_hours, g.budget_dollars, g.target_bpb) == (None, None, None, None):
            raise ConfigError(
                "nothing says how large the run is; give --depth, --flops, --budget-dollars, --budget-hours or --target-bpb"
            )
        return Goal(flops=g.flops, budget_hours=g.budget_hours, budget_dollars=g.budget_dollars, target_bpb=g.target_bpb)

    def known(self) -> tuple[list[RunRecord], DataConfig | None, int, float]:
        """Records, data, vocabulary and bytes per token of the storage root, or the defaults without one."""
        if self.packing not in ("", *get_args(Packing)):
            raise ConfigError(f"packing {self.packing!r} must be one of {', '.join(get_args(Packing))}")
        unknown = DataConfig(packing=cast("Packing", self.packing)) if self.packing else None
        if not self.storage:
            return [], unknown, 32768, BYTES_PER_TOKEN
        root = Workspace(self.storage)
        if not (root.shards_dir / "manifest.json").exists():
            return root.records(), unknown, 32768, BYTES_PER_TOKEN
        data = root.data_config(cast("Packing", self.packing or "keep_remainder"))
        return root.records(), data, root.vocab_size, root.bytes_per_token


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """What is looked at while it runs."""

    webhook: str = ""
    """Address that alerts are posted to as JSON: loss spikes, non-finite values, stalled ranks, drops of speed, restarts."""
    mlflow: str | None = None
    """Tracking server; left out: mlflow.db under the storage root; "" for none."""
    sample_every: int = 0
    """Steps between sampled texts; 0: none."""
    core_bundle: str = ""
    """Folder, zip or address of the CORE tasks, or download; left out: no CORE."""
    core_every: int = 0
    """Steps between CORE evaluations; 0: at the end only."""
    core_max_per_task: int = 500
    checkpoint_minutes: float = 15.0
    """What a crash may cost."""

    def options(self, *, address: str, quiet: bool) -> LaunchOptions:
        from nanoladder.launch import LaunchOptions

        return LaunchOptions(
            address=address or None,
            quiet=quiet,
            webhook=self.webhook,
            mlflow=self.mlflow,
            sample_every_steps=self.sample_every,
            core_bundle=self.core_bundle,
            core_every_steps=self.core_every,
            core_max_per_task=self.core_max_per_task,
            checkpoint_every_seconds=60 * self.checkpoint_minutes,
        )


@dataclass(frozen=True, kw_only=True)
class Launch(Plan):
    """Show the plan, ask once, run it on Ray Train, and write prediction against result. Started again it goes on.

    A law with a bad status stops it, unless the law is named with --accept-law or --without-law; a loss prediction whose verdict
    is refuse stops it, unless --accept-law prediction.

    Example: nanoladder launch --depth 24 --device h100 --num-devices 8 --price 3 --storage runs

    After the demo: nanoladder launch --depth 2 --head-dim 32 --sequence-len 256 --window-pattern L --num-tokens 1e6 --device cpu
    --storage demo --laws demo/laws.json --without-law weight_decay
    """

    storage: Storage = "runs"
    """Root folder with the token shards; the run goes under it."""
    address: str = ""
    """Of a Ray cluster; left out: a Ray of its own on this machine."""
    watch: WatchOptions = field(default_factory=WatchOptions)
    yes: bool = False
    """Do not ask."""

    def run(self) -> int:
        from nanoladder.launch import check_launch, launch

        plan, workspace = self.plan(), Workspace(self.storage)
        if not self.json:
            print_plan(plan)
        check_launch(plan, workspace)
        if not self.yes and not confirm():
            print("not launched")
            return 1
        verdict = launch(plan, workspace, self.watch.options(address=self.address, quiet=self.json))
        if self.json:
            print_json(verdict)
        else:
            print(f"run: {workspace.run_dir(verdict['run_id'])} (--checkpoint of sft, eval and chat)")
        return 0 if verdict["status"] == "complete" else 1


def read_laws(path: str) -> dict[str, Any] | None:
    """laws.json as plain data, checked against its schema; None without a path."""
    if not path:
        return None
    from analysis.laws import Laws

    return Laws.load(path).as_dict()


def confirm() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("launch asks before it starts and there is no terminal to ask on; give --yes")
    return input("launch this run? [y/N] ").strip().lower() in ("y", "yes")
