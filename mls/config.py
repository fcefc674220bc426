"""The configuration: frozen dataclasses, the only place where a default stands, and what cannot work together.
Defaults are the paper's where it states one. How recipes and overrides become a Config is in recipes.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mls.errors import ConfigError
from mls.files import runs_folder


@dataclass(frozen=True)
class RunConfig:
    seed: int = 0
    name: str | None = None  # folder name; default: recipe + date + short hash
    root: str | None = None  # where run folders go; default: $MLS_RUNS, else ./runs
    recipe: str = "custom"  # filled in from the recipe's file name
    plugins: list[str] = field(default_factory=list)  # files and modules imported first; --import adds to them


@dataclass(frozen=True)
class ScenesConfig:
    """The embedded scenes (mls/data/scenes.py says what each knob draws)."""

    count: int = 6000
    test_count: int = 2000
    size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class DataConfig:
    source: str = "auto"  # folder, list, coco, voc, tar, scenes, a plug-in's, or auto: found out from root
    root: str | None = None
    annotations: str | None = None  # COCO json or VOC split, where labels come from; a text list's image folder is root
    batch_size: int = 256  # images per step over all processes together
    workers: int | None = None  # per process; default: the cores this process may use, at most 8
    limit: int | None = None  # only the first n images
    max_unreadable: float = 0.01  # share of images that may be broken before the run stops
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass(frozen=True)
class AugmentConfig:
    """MoCo-v2's distribution."""

    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8  # probability of the colour jitter
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    noise: float = 0.0  # largest standard deviation of added Gaussian noise, drawn per view
    small_crops: int = 0  # multi-crop: this many small crops beside the two large ones
    small_size: int = 96
    small_scale: tuple[float, float] = (0.05, 0.14)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = "resnet50"  # a torchvision ResNet, resnet_tiny, or timm:NAME
    weights: str | None = None  # start from these backbone weights instead of a random initialisation
    projection: int = 256
    hidden: int | None = None  # width of the head's hidden layer; default: the backbone's feature width
    head_norm: Literal["none", "batch"] = "none"
    momentum: float = 0.995  # of the key encoder
    key_norm: Literal["shuffle", "split", "sync", "none"] = "shuffle"
    key_group: int = 32  # images that share statistics under key_norm=split


@dataclass(frozen=True)
class DictionaryConfig:
    size: int = 4096
    own_rows: Literal["keep", "exclude"] = "keep"  # a query's own older rows: kept as the papers do, or masked
    storage: Literal["fp32", "fp16", "bf16"] = "fp32"  # how rows are kept; products are taken in fp32
    sharded: bool = False  # each process holds its part of the rows; the result is the same to rounding


@dataclass(frozen=True)
class MatchingConfig:
    backend: str = "torch"  # torch, faiss, or auto: measured at the start of the run, and kept


@dataclass(frozen=True)
class ObjectiveConfig:
    method: Literal["mls", "moco_v2", "knn_moco", "supervised"] = "mls"  # the last is a control
    temperature: float = 0.2
    k: int = 20
    weight: float = 0.5  # the paper's lambda
    loss: str = "bce"
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the loss
    normalise: Literal["mean", "positives", "balanced"] = "mean"
    labels_from: Literal["backbone", "projection", "union", "intersection"] = "backbone"
    classify_with: Literal["backbone", "projection"] = "projection"
    warmup_epochs: float = 0.0  # InfoNCE alone for the first epochs
    in_batch_negatives: bool = False  # the batch's other keys as extra negatives of InfoNCE
    pseudo_labels: Literal["matched", "random", "oracle"] = "matched"  # the last two are controls, not methods


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: float = 0.3  # per 256 images; the scaled value is printed
    scale_lr: bool = True
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 400
    warmup_epochs: float = 0.0
    final_lr: float = 0.0  # share of the peak reached at the end of the cosine


@dataclass(frozen=True)
class EngineConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on a GPU, fp32 on a CPU
    channels_last: bool = True
    compile: bool = False
    accumulate: int = 1  # micro-batches per step
    threads: int | None = None  # CPU threads per process; default: torch's own choice
    checkpoint_every: int = 1000  # steps
    keep_last: int = 2
    milestone_epochs: int | None = None  # also keep a checkpoint every n epochs for good
    max_steps: int | None = None  # stop after this step of the schedule, as if interrupted there
    max_bad_steps: int = 5  # non-finite steps in a row before giving up


@dataclass(frozen=True)
class MonitorConfig:
    log_every: int = 20  # steps
    health_every: int = 200  # steps: collapse measures of the dictionary
    knn_every_epochs: int = 1  # when the source has labels; 0: never
    linear_every_epochs: int = 10  # the linear probe, the same
    knn_images: int = 2000  # images embedded for both, train and held out together
    tensorboard: bool = False
    wandb: str | None = None  # project name


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain Python, as it is stored in checkpoints and YAML."""
    return _plain(asdict(config))


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, in the order of the dataclasses."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def differences(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """The keys in which two configurations differ, with both values."""
    other = dict(flatten(second))
    return [(key, value, other[key]) for key, value in flatten(first) if value != other[key]]


POSITIVE = [
    "data.batch_size",
    "dictionary.size",
    "objective.k",
    "objective.temperature",
    "optim.epochs",
    "optim.lr",
    "engine.accumulate",
    "engine.checkpoint_every",
    "engine.keep_last",
    "engine.max_bad_steps",
    "augment.size",
    "model.projection",
    "model.key_group",
    "monitor.log_every",
    "monitor.health_every",
]
SHARES = ["augment.flip", "augment.jitter", "augment.grey", "augment.blur", "model.momentum", "data.max_unreadable"]
RANGES = ["augment.scale", "augment.small_scale", "augment.ratio", "augment.blur_sigma"]


def check(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is loaded."""
    batch, size, k = config.data.batch_size, config.dictionary.size, config.objective.k
    values = dict(flatten(config))
    for key in POSITIVE:
        if not values[key] > 0:
            raise ConfigError(f"{key} is {values[key]}: it must be greater than 0")
    for key in SHARES:
        if not 0 <= values[key] <= 1:
            raise ConfigError(f"{key} is {values[key]}: it must lie between 0 and 1")
    for key in RANGES:
        low, high = values[key]
        if not 0 < low <= high:
            raise ConfigError(f"{key} is [{low}, {high}]: it must be two rising numbers greater than 0")
    if size < batch:
        raise ConfigError(
            f"dictionary.size {size} is smaller than the batch {batch}: "
            f"raise dictionary.size to {batch} or more, or lower data.batch_size"
        )
    if k > size:
        raise ConfigError(f"objective.k {k} is larger than dictionary.size {size}: lower objective.k")
    if batch % config.engine.accumulate:
        raise ConfigError(
            f"data.batch_size {batch} does not divide into engine.accumulate {config.engine.accumulate} "
            "equal micro-batches: change one of them"
        )
    if config.objective.method == "knn_moco" and config.objective.loss not in ("bce", "softmax"):
        raise ConfigError(
            f"objective.method=knn_moco is the softmax over neighbours, objective.loss={config.objective.loss} is not: "
            "use objective.method=mls with that loss"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def runs_root(config: Config) -> Path:
    return Path(config.run.root).expanduser() if config.run.root else runs_folder()
