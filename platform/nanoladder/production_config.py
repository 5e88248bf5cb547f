"""The file that says what `nanoladder production` makes: TOML, one table a stage, every value with a default."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_model.config import GPTConfig, Packing
from nanochat_model.errors import ConfigError
from nanochat_model.identity import from_dict
from nanochat_model.overrides import dotted_keys
from nanoladder.target import DeviceOptions

DEMO_CONVERSATIONS = "demo"  # the project's own, made on the spot


@dataclass(frozen=True, kw_only=True)
class DataStage:
    """Text and tokens. With `source` nothing is downloaded."""

    dataset: str = "climbmix"  # climbmix, fineweb-edu, owner/name on the hub, or addresses separated by blanks
    source: str = ""  # instead of a download: stdlib, site-packages, or a file or folder of parquet or jsonl
    endpoint: str = ""  # of a mirror of the hub
    revision: str = ""
    shards: int = 0  # files to fetch; 0: as many as the plan needs
    vocab_size: int = 32768
    val_fraction: float = 0.05
    num_workers: int = 0  # processes that tokenize; 0: all CPUs


@dataclass(frozen=True, kw_only=True)
class ModelStage:
    depth: int = 24
    sequence_len: int = 2048
    window_pattern: str = "SSSL"
    aspect_ratio: int = 64
    head_dim: int = 128

    def build(self, vocab_size: int) -> GPTConfig:
        shape = dataclasses.asdict(self)
        return GPTConfig.from_depth(shape.pop("depth"), vocab_size=vocab_size, **shape)


@dataclass(frozen=True, kw_only=True)
class PretrainingStage:
    """At most one of the three horizons; without one the laws', else the recipe's."""

    laws: str = ""
    recipe: str = ""  # see nanoladder.recipes
    accept_law: tuple[str, ...] = ()
    without_law: tuple[str, ...] = ()
    tokens_per_param: float | None = None
    num_tokens: float | None = None
    train_flops: float | None = None
    packing: Packing = "keep_remainder"
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)  # dotted keys of the training config
    sample_every_steps: int = 0
    core_every_steps: int = 0
    checkpoint_minutes: float = 15.0
    webhook: str = ""


@dataclass(frozen=True, kw_only=True)
class DeviceStage(DeviceOptions):
    """As for `nanoladder plan`, with a whole node as the default."""

    num_devices: int = 8


@dataclass(frozen=True, kw_only=True)
class EvaluationStage:
    num_tokens: int = 0  # of validation; 0: as many as in training
    core_bundle: str = ""  # folder, zip, address or "download"; "": no CORE
    core_max_per_task: int = 0  # examples a task; 0: all


@dataclass(frozen=True, kw_only=True)
class SftStage:
    """Conversations: "demo" (the project's own), paths of jsonl or parquet, or datasets under `tasks_dir` as NAME=EPOCHS."""

    conversations: tuple[str, ...] = (DEMO_CONVERSATIONS,)
    tasks_dir: str = ""
    num_epochs: float = 1.0
    num_steps: int = 0  # instead of epochs, if over 0
    batch_tokens: int = 0  # 0: the base's
    lr_fraction: float = 0.8
    num_demo_conversations: int = 1500


@dataclass(frozen=True, kw_only=True)
class ChatStage:
    """Tasks: names under `sft.tasks_dir`, name=path of a file, or "demo" for questions like the project's conversations."""

    tasks: tuple[str, ...] = (DEMO_CONVERSATIONS,)
    max_problems: int = 0
    max_new_tokens: int = 512
    prompt: str = "What is 7 + 5?"  # asked at the end, for the report


@dataclass(frozen=True, kw_only=True)
class ProductionConfig:
    """From data to a model that one can talk to."""

    name: str = "production"
    data: DataStage = field(default_factory=DataStage)
    model: ModelStage = field(default_factory=ModelStage)
    pretraining: PretrainingStage = field(default_factory=PretrainingStage)
    device: DeviceStage = field(default_factory=DeviceStage)
    evaluation: EvaluationStage = field(default_factory=EvaluationStage)
    sft: SftStage = field(default_factory=SftStage)
    chat: ChatStage = field(default_factory=ChatStage)


def read_production(path: str | Path, overrides: Mapping[str, str] | None = None) -> ProductionConfig:
    """A TOML file with strict overrides by dotted key, their values as TOML writes them (text may go without quotes).

    Raises ConfigError naming an unknown key or a value of another type.
    """
    try:
        plain = tomllib.loads(Path(path).read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(f"no production file {path}; the repository's production/ folder has some to start from") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid TOML ({e})") from None
    known = dotted_keys(ProductionConfig())
    for key, text in (overrides or {}).items():
        if key not in known and not key.startswith("pretraining.overrides."):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown override {key!r}; did you mean {near!r}?")
        *tables, name = key.split(".", 2) if key.startswith("pretraining.overrides.") else key.split(".")
        table = plain
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = _toml_value(text)
    config = from_dict(ProductionConfig, plain, f"{path}: ")
    _check_types(config, f"{path}: ")
    return check(config)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_types(config: Any, where: str) -> None:
    """ConfigError where a value is not of its field's type (whole numbers may stand for others)."""
    for f in dataclasses.fields(config):
        value, default = getattr(config, f.name), f.default
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{where}{f.name}.")
        elif isinstance(default, bool | int | float | str):
            number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
            if type(value) is not type(default) and not number:
                raise ConfigError(f"{where}{f.name} {value!r} is not of type {type(default).__name__}, for example {default!r}")
        elif value is not None and default is None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{where}{f.name} {value!r} is not a number")
        elif isinstance(default, tuple) and not (isinstance(value, tuple) and all(isinstance(v, str) for v in value)):
            raise ConfigError(f"{where}{f.name} {value!r} is not a list of texts")


def check(config: ProductionConfig) -> ProductionConfig:
    """ConfigError for values that would only be found wrong hours later."""
    p = config.pretraining
    horizons = [n for n in ("tokens_per_param", "num_tokens", "train_flops") if getattr(p, n) is not None]
    if len(horizons) > 1:
        raise ConfigError(f"pretraining has {' and '.join(horizons)}; give at most one horizon")
    if p.core_every_steps and not config.evaluation.core_bundle:
        raise ConfigError("pretraining.core_every_steps needs evaluation.core_bundle")
    if not config.sft.conversations:
        raise ConfigError('sft.conversations is empty; give files, datasets, or ["demo"]')
    return config
