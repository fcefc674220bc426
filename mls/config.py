"""The configuration: frozen dataclasses, the only place where a default and its limits stand, and what cannot work
together. Defaults are the paper's where it states one. How recipes and overrides become a Config is in recipes.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from mls import yaml_files
from mls.errors import ConfigError
from mls.files import runs_folder
from mls.plugins import Registry

# Of every number without narrower limits. A float stays finite in fp32 after a product with any integer.
LARGEST, LARGEST_INTEGER = 1e28, 2**31 - 1


def limited(
    default: Any,
    *,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
    empty: bool | None = None,
) -> Any:
    """A key with limits, which `check_limits` holds: greater than `above`, at least `low`, at most `high`, and finite.
    None, where a key allows it, is within all limits; of several values (one or more, unless it may be `empty`) each
    must be."""
    limits = {"above": above, "low": low, "high": high, "empty": empty}
    metadata = {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(default: Any) -> Any:
    return limited(default, above=0)


def zero_or_more(default: Any) -> Any:
    return limited(default, low=0)


def share(default: Any) -> Any:
    return limited(default, low=0, high=1)


def any_seed(default: int) -> Any:
    return limited(default, low=-(2**63), high=2**63 - 1)


def rising(default: tuple[float, float]) -> Any:
    """Two rising numbers greater than 0."""
    return field(default=default, metadata={"above": 0, "high": 1000, "rising": True})


@dataclass(frozen=True)
class RunConfig:
    seed: int = any_seed(0)
    name: str | None = None  # folder name; default: recipe + date + short hash
    root: str | None = None  # where run folders go; default: $MLS_RUNS, else ./runs
    recipe: str = "custom"  # filled in from the recipe's file name
    plugins: list[str] = field(default_factory=list)  # files and modules imported first; --import adds to them
    auto: list[str] = field(default_factory=list)  # keys set to auto: sized to the images when the run starts


@dataclass(frozen=True)
class ScenesConfig:
    """The embedded scenes (mls/data/scenes.py says what each knob draws)."""

    count: int = positive(6000)
    test_count: int = positive(2000)
    size: int = positive(32)
    seed: int = any_seed(0)
    style: Literal["standard", "easy", "hard"] = "standard"
    objects: str | None = None  # class folders of photographs, which take the digits' place


@dataclass(frozen=True)
class ImagesConfig:
    """What pretraining and every downstream protocol say of their images."""

    root: str | None = None  # of a protocol: by default the data set's folder under $MLS_DATA
    workers: int | None = zero_or_more(None)  # per process; default: the cores this process may use, at most 8
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    source: str = "auto"  # folder, list, coco, voc, tar, parquet, huggingface, scenes, a plug-in's, or auto: by root
    annotations: str | None = None  # COCO json, VOC or Hugging Face split; a text list's image folder is root
    batch_size: int = positive(256)  # images per step over all processes together
    limit: int | None = positive(None)  # only the first n images
    max_unreadable: float = share(0.01)  # share of images that may be broken before the run stops


@dataclass(frozen=True)
class AugmentConfig:
    """MoCo-v2's distribution."""

    size: int = positive(224)
    scale: tuple[float, float] = rising((0.2, 1.0))
    ratio: tuple[float, float] = rising((0.75, 4 / 3))
    flip: float = share(0.5)
    jitter: float = share(0.8)  # probability of the colour jitter
    brightness: float = zero_or_more(0.4)
    contrast: float = zero_or_more(0.4)
    saturation: float = zero_or_more(0.4)
    hue: float = limited(0.1, low=0, high=0.5)
    grey: float = share(0.2)
    blur: float = share(0.5)
    blur_sigma: tuple[float, float] = rising((0.1, 2.0))
    noise: float = zero_or_more(0.0)  # largest standard deviation of added Gaussian noise, drawn per view
    small_crops: int = zero_or_more(0)  # multi-crop: this many small crops beside the two large ones
    small_size: int = positive(96)
    small_scale: tuple[float, float] = rising((0.05, 0.14))
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = positive((0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = "resnet50"  # a torchvision ResNet, resnet_tiny, or timm:NAME
    weights: str | None = None  # start from these backbone weights instead of a random initialisation
    projection: int = positive(256)
    hidden: int | None = positive(None)  # width of the head's hidden layer; default: the backbone's feature width
    head_norm: Literal["none", "batch"] = "none"
    drop_path: float = limited(
        0.0, low=0, high=0.9
    )  # stochastic depth of a network of timm: the last block's rate; the first has none
    freeze_patches: bool = False  # a transformer's patch projection stays as it begins, as in MoCo-v3
    momentum: float = share(0.995)  # of the key encoder
    final_momentum: float | None = share(None)  # reached by a half cosine at the end of the run; default: it stays
    key_norm: Literal["shuffle", "split", "sync", "none"] = "shuffle"
    key_group: int = limited(32, low=2)  # images that share statistics under key_norm=split


@dataclass(frozen=True)
class DictionaryConfig:
    size: int = positive(4096)
    own_rows: Literal["keep", "exclude"] = "keep"  # a query's own older rows: kept as the papers do, or masked
    storage: Literal["fp32", "fp16", "bf16"] = "fp32"  # how rows are kept; products are taken in fp32
    sharded: bool = False  # each process holds its part of the rows; the result is the same to rounding


@dataclass(frozen=True)
class MatchingConfig:
    backend: str = "torch"  # torch, faiss, or auto: measured at the start of the run, and kept


@dataclass(frozen=True)
class ObjectiveConfig:
    """What every method's options have in common: `objective.method` chooses the method, and with it the dataclass that
    `objective.*` is checked against. A method from outside derives its own from this one."""

    method: str = "mls"

    def check(self, config: Config) -> None:
        """Refuse what cannot work together, before anything is loaded."""


NOT_A_KEY = "not a key"
# Keys that may be `auto` in a recipe or an override: engine/sizing.py holds a rule for each, in this order.
SIZED = ("augment.size", "augment.blur", "model.backbone", "data.batch_size", "model.key_group", "dictionary.size")
SIZED += ("objective.k", "optim.epochs", "optim.warmup_epochs", "objective.warmup_epochs", "model.momentum")
SIZED += ("engine.checkpoint_every", "monitor.health_every")
SIZED += ("objective.windows.size", "objective.regions.size", "objective.words")
OBJECTIVES = Registry[type[ObjectiveConfig]]("objective.method")


_objective = OBJECTIVES.register


@dataclass(frozen=True)
class WindowsConfig:
    """Small windows of each image, each cut and augmented twice and told from all other windows of the batch."""

    count: int = zero_or_more(0)  # an image; 0: no such term
    size: int = positive(112)  # pixels they are scaled to
    scale: tuple[float, float] = rising((0.14, 0.39))  # share of the image's area
    jitter: float = share(0.15)  # the second cut is moved and scaled by up to this share of the window's sides
    weight: float = positive(1.0)
    temperature: float = positive(0.2)
    same_image: bool = True  # other windows of the same image are negatives, too


@dataclass(frozen=True)
class GridConfig:
    """Windows of a grid through the run's own key encoder: the regions of its images."""

    every_epochs: int = zero_or_more(4)  # from the end of the warm-up on, anew after so many epochs; 0: once
    grid: int = positive(3)  # windows in a row and in a column
    side: float = limited(0.5, above=0, high=1)  # of a window: a share of the image's shorter side
    size: int = positive(112)  # pixels that a window is scaled to
    whiten: int = zero_or_more(32)  # principal components that are kept, scaled to the same variance; 0: only centred


@dataclass(frozen=True)
class RegionsConfig(GridConfig):
    """Which images are neighbours, by regions (`objective.labels_from=regions`)."""

    lists: str | None = None  # a file of `mls regions`; default: the run finds neighbours with its own key encoder
    neighbours: int = positive(256)  # of each image
    choose: Literal["nearest", "threshold"] = "nearest"  # k rows for each image, or k on average: all above one score
    novelty: float = zero_or_more(0.0)  # so much of the whole images' similarity is taken off, in standard deviations
    soft: float = zero_or_more(0.0)  # positives weigh by exp(score / soft), 1 on average; 0: all the same


@_objective("moco_v2")
@dataclass(frozen=True)
class MoCoOptions(ObjectiveConfig):
    method: str = "moco_v2"
    temperature: float = positive(0.2)
    in_batch_negatives: bool = False  # the batch's other keys as extra negatives of InfoNCE
    windows: WindowsConfig = field(default_factory=WindowsConfig)

    def check(self, config: Config) -> None:
        batch, size = config.data.batch_size, config.dictionary.size
        if size < batch:
            raise ConfigError(
                f"dictionary.size {size} is smaller than the batch {batch}: "
                f"raise dictionary.size to {batch} or more, or lower data.batch_size"
            )


@dataclass(frozen=True)
class LabelledOptions(MoCoOptions):
    """Of methods with a term of pseudo-labels beside InfoNCE."""

    label_windows: bool = False  # windows are queries of that term, too

    def check(self, config: Config) -> None:
        super().check(config)
        if self.label_windows and not self.windows.count:
            raise ConfigError(
                "objective.label_windows=true has no windows to label: set objective.windows.count=2 or so"
            )


@_objective("mls")
@dataclass(frozen=True)
class MLSOptions(LabelledOptions):
    method: str = "mls"
    k: int = positive(20)
    weight: float = zero_or_more(0.5)  # the paper's lambda
    info_nce_weight: float = zero_or_more(1.0)  # 0: the multi-label loss alone, which the paper calls unstable
    loss: str = "bce"
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the loss
    normalise: Literal["mean", "positives", "balanced"] = "mean"
    labels_from: Literal["backbone", "projection", "union", "intersection", "regions"] = "backbone"
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    classify_with: Literal["backbone", "projection"] = "projection"
    warmup_epochs: float = zero_or_more(0.0)  # InfoNCE alone for the first epochs
    pseudo_labels: Literal["matched", "random", "oracle"] = "matched"  # the last two are controls, not methods
    oracle_share: float = share(1.0)  # of the positives of pseudo_labels=oracle; the others are random

    def check(self, config: Config) -> None:
        super().check(config)
        if self.k > config.dictionary.size:
            raise ConfigError(
                f"objective.k {self.k} is larger than dictionary.size {config.dictionary.size}: lower objective.k"
            )
        if self.warmup_epochs > 0 and self.info_nce_weight == 0:
            raise ConfigError(
                f"objective.warmup_epochs {self.warmup_epochs:g} trains with InfoNCE alone, which "
                "objective.info_nce_weight=0 switches off: set objective.warmup_epochs=0"
            )


@_objective("mls_words")
@dataclass(frozen=True)
class WordsOptions(LabelledOptions):
    method: str = "mls_words"
    words: int = limited(128, low=2)  # clusters of the regions of all images: the classes
    sharpness: float = positive(0.1)  # temperature of a region's softmax over the words
    weight: float = zero_or_more(1.0)  # of the term beside InfoNCE
    regions: GridConfig = field(default_factory=GridConfig)
    warmup_epochs: float = zero_or_more(0.0)  # InfoNCE and windows alone for the first epochs
    # The last two are controls, not methods: the words of another image, the true labels in the words' place.
    pseudo_labels: Literal["matched", "random", "oracle"] = "matched"


@_objective("knn_moco")
@dataclass(frozen=True)
class KnnMoCoOptions(MLSOptions):
    method: str = "knn_moco"
    loss: str = "softmax"

    def check(self, config: Config) -> None:
        super().check(config)
        if self.loss not in ("bce", "softmax"):  # bce: what a recipe of mls says
            raise ConfigError(
                f"objective.method=knn_moco is the softmax over neighbours, objective.loss={self.loss} is not: "
                "use objective.method=mls with that loss"
            )


@_objective("supervised")
@dataclass(frozen=True)
class SupervisedOptions(MoCoOptions):
    """A control: the true labels."""

    method: str = "supervised"

    def check(self, config: Config) -> None:
        super().check(config)
        no_windows(self)


def no_small_crops(config: Config) -> None:
    if config.augment.small_crops:
        raise ConfigError(f"objective.method={config.objective.method} takes two crops: use augment.small_crops=0")


@dataclass(frozen=True)
class TwoCropOptions(ObjectiveConfig):
    """Of a method that takes two crops of an image and nothing else."""

    def check(self, config: Config) -> None:
        no_small_crops(config)


@_objective("simsiam")
@dataclass(frozen=True)
class SimSiamOptions(TwoCropOptions):
    method: str = "simsiam"
    predictor: int = positive(512)  # width of the predictor's hidden layer


@_objective("byol")
@dataclass(frozen=True)
class BYOLOptions(TwoCropOptions):
    method: str = "byol"
    predictor: int = positive(4096)  # width of the predictor's hidden layer


@_objective("moco_v3")
@dataclass(frozen=True)
class MoCoV3Options(TwoCropOptions):
    method: str = "moco_v3"
    temperature: float = positive(0.2)
    hidden: int = positive(4096)  # width of the hidden layers of projector and predictor


@_objective("densecl")
@dataclass(frozen=True)
class DenseCLOptions(MoCoOptions):
    method: str = "densecl"
    dense_weight: float = share(0.5)  # the paper's lambda: the global term has the rest
    dense_projection: int = positive(128)

    def check(self, config: Config) -> None:
        super().check(config)
        no_windows(self)
        no_small_crops(config)


@_objective("slotcon")
@dataclass(frozen=True)
class SlotConOptions(TwoCropOptions):
    method: str = "slotcon"
    prototypes: int = limited(256, low=2)
    hidden: int = positive(4096)  # width of the hidden layers of head and predictor
    temperature: float = positive(0.2)  # of the slots' InfoNCE
    student_temperature: float = positive(0.1)
    teacher_temperature: float = positive(0.07)
    centre_momentum: float = share(0.9)
    group_weight: float = share(0.5)  # the slots' InfoNCE has the rest


def no_windows(options: MoCoOptions) -> None:
    if options.windows.count:
        raise ConfigError(f"objective.method={options.method} has no term of windows: use objective.windows.count=0")


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: float = positive(0.3)  # per 256 images; the scaled value is printed
    scale_lr: bool = True
    layer_decay: float = limited(1.0, above=0, high=1)  # times lr, once for every stage between a layer and the heads
    clip_norm: float | None = positive(None)  # a longer gradient is scaled down to this length; default: none is
    weight_decay: float = zero_or_more(1e-4)
    final_weight_decay: float | None = zero_or_more(None)  # reached as model.final_momentum is; default: it stays
    decay_norm_and_bias: bool = True  # and a transformer's positions and class token
    momentum: float = share(0.9)
    nesterov: bool = False
    betas: tuple[float, float] = limited((0.9, 0.999), low=0, high=1 - 1e-9)
    epochs: int = positive(400)
    warmup_epochs: float = zero_or_more(0.0)
    final_lr: float = share(0.0)  # share of the peak reached at the end of the cosine


@dataclass(frozen=True)
class EngineConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on a GPU, fp32 on a CPU
    channels_last: bool = True
    augment: Literal["auto", "worker", "device"] = "auto"  # where views get their colours; worker beside a CPU
    compile: bool = False  # torch.compile the encoders, and what augments on the device
    checkpointing: bool = False  # blocks are computed once more in the backward pass: less memory, the same gradients
    accumulate: int = positive(1)  # micro-batches per step
    threads: int | None = zero_or_more(None)  # CPU threads per process; default: torch's own choice
    checkpoint_every: int = positive(1000)  # steps
    checkpoint_minutes: float = positive(10.0)  # and after so many minutes at the latest: what a kill -9 may cost
    keep_last: int = positive(2)
    milestone_epochs: int | None = zero_or_more(None)  # also keep a checkpoint every n epochs for good
    max_steps: int | None = positive(None)  # stop after this step of the schedule, as if interrupted there
    max_bad_steps: int = positive(5)  # non-finite steps in a row before giving up
    timeout_minutes: float = limited(30.0, above=0, high=10_000)  # a process or data worker silent so long is lost
    deterministic: bool = False  # only algorithms that give the same bits each time, on a GPU too; slower


@dataclass(frozen=True)
class MonitorConfig:
    log_every: int = positive(20)  # steps
    health_every: int = positive(200)  # steps: collapse measures of the dictionary
    knn_every_epochs: int = zero_or_more(1)  # when the source has labels; 0: never
    linear_every_epochs: int = zero_or_more(10)  # the linear probe, the same
    dense_every_epochs: int = zero_or_more(
        0
    )  # segmentation by the nearest patches, when the source has masks; 0: never
    dense_images: int = limited(200, low=10)  # images with masks for it, of which a fifth is segmented
    moments: int = zero_or_more(
        12
    )  # times at which what 60 fixed queries match is kept (mls/monitor/moments.py); 0: never
    knn_images: int = positive(2000)  # images embedded for both, train and held out together
    # What is the start of a run still worth? Its RankMe and kNN on fixed images, and what became of them.
    guard: Literal["off", "warn", "stop"] = "off"  # what is done where one has fallen
    guard_images: int = limited(500, low=50)
    guard_fall: float = share(0.1)  # more than this share of the start's number
    guard_every_epochs: int = positive(1)
    tensorboard: bool = False
    wandb: str | None = None  # project name
    mlflow: str | None = None  # experiment name


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    objective: ObjectiveConfig = field(default_factory=MLSOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain Python, as it is stored in checkpoints and YAML."""
    return _plain(asdict(config))


def to_yaml(config: Config) -> str:
    return yaml_files.dump(to_dict(config))


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, in the order of the dataclasses."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def differences(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """The keys in which two configurations differ, with both values. What only one of two methods has is listed where
    it is not that method's default, beside NOT_A_KEY: the method's name says the rest.

    >>> differences(Config(), Config(objective=SimSiamOptions()))
    [('objective.method', 'mls', 'simsiam')]
    """
    here, there = dict(flatten(first)), dict(flatten(second))
    usual = dict(flatten(type(first.objective)(), "objective.")) | dict(flatten(type(second.objective)(), "objective."))
    rows = [(key, here.get(key, NOT_A_KEY), there.get(key, NOT_A_KEY)) for key in {**here, **there}]
    return [row for row in rows if row[1] != row[2] and (NOT_A_KEY not in row or usual[row[0]] not in row)]


def defaults(values: Mapping[str, Any]) -> Config:
    """The default configuration for the method that these values choose."""
    objective = values.get("objective")
    name = objective.get("method") if isinstance(objective, Mapping) else None
    return Config(objective=OBJECTIVES[str(name)]()) if name is not None else Config()


def methods_with(key: str) -> list[str]:
    """The methods whose options have the dotted key, such as objective.k, as a value, a section or inside a mapping."""
    section, _, name = key.partition(".")

    def has(method: str) -> bool:
        known = [f"{other}." for other, _ in flatten(OBJECTIVES[method]())]
        return any(other.startswith(f"{name}.") or f"{name}.".startswith(other) for other in known)

    return [method for method in OBJECTIVES.names() if section == "objective" and has(method)]


def check(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is loaded; of sizes that are still `auto`, once they are
    numbers."""
    if config.run.auto:
        return
    if config.data.batch_size % config.engine.accumulate:
        raise ConfigError(
            f"data.batch_size {config.data.batch_size} does not divide into engine.accumulate "
            f"{config.engine.accumulate} equal micro-batches: change one of them"
        )
    config.objective.check(config)


def check_limits(config: Any, prefix: str = "") -> None:
    """Hold the limits that stand on the fields of any dataclass of dataclasses, and those of every number."""
    for item in fields(config):
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            check_limits(value, f"{key}.")
        elif value is not None:
            _check_limit(key, value, item.metadata)


def _check_limit(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    values = list(_numbers(value))
    for one in values:
        if isinstance(one, float) and not math.isfinite(one):
            raise ConfigError(f"{key} is {one}: it must be a finite number")
    if limits.get("rising") and not 0 < values[0] <= values[1]:
        raise ConfigError(f"{key} is [{values[0]}, {values[1]}]: it must be two rising numbers greater than 0")
    if limits and value == [] and not limits.get("empty"):
        raise ConfigError(f"{key} is empty: give one or more values")
    above, low, high = limits.get("above"), limits.get("low"), limits.get("high")
    for one in values:
        if above is not None and not one > above:
            raise ConfigError(f"{key} is {one}: it must be greater than {above:g}")
        if not (low is None or one >= low) or not (high is None or one <= high):
            must = f"lie between {low} and {high}" if None not in (low, high) else "be at least " + str(low)
            raise ConfigError(f"{key} is {one}: it must {must if low is not None else f'be at most {high}'}")
        largest = LARGEST if isinstance(one, float) else LARGEST_INTEGER
        if high is None and abs(one) > largest:
            raise ConfigError(f"{key} is {one:.3g}: it must lie between {-largest:g} and {largest:g}")


def _numbers(value: Any) -> Iterator[int | float]:
    """Those in a value, a list or a mapping of options."""
    if isinstance(value, (list, tuple, Mapping)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def runs_root(config: Config) -> Path:
    return Path(config.run.root).expanduser() if config.run.root else runs_folder()
