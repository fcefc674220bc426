"""Protocols: a downstream evaluation as YAML (configs/eval/), of which `task` says what is done. The dataclasses here
are the only place where a default of a protocol stands."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mls.config import AugmentConfig, ScenesConfig
from mls.errors import ConfigError, unknown_name
from mls.recipes import Kind, build, find, load_yaml, read_yaml, shipped


@dataclass(frozen=True)
class DataConfig:
    name: str = "scenes"  # mls.eval.data.names()
    root: str | None = None  # default: the data set's folder under $MLS_DATA
    check_sizes: bool = True  # refuse another number of images than published
    labels: Literal["full", "one_positive_all_negatives", "single_positive", "partial_positives", "partial_labels"] = (
        "full"  # what the training sees of the truth (eval/regimes.py)
    )
    proportion: float = 0.5  # of the partial regimes
    seed: int = 1200  # of the labels that are drawn and of the split: the papers' number
    validation: float = 0.2  # share of train held out to choose the model, where no split is published for it
    train_crop: Literal["squash", "random"] = "squash"  # the whole image scaled to a square, or a random resized crop
    test_crop: Literal["squash", "centre"] = "squash"
    test_resize: float = 1.0  # centre: the short side is scaled to this many times augment.size before the crop
    workers: int | None = None  # default: the cores this process may use, at most 8
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = "scratch:resnet50"  # what `--weights random` builds
    weights: str = "torchvision:resnet50@IMAGENET1K_V1"  # where no --weights are given: the paper's


@dataclass(frozen=True)
class TrainingConfig:
    loss: str = "an"
    options: dict[str, Any] = field(default_factory=dict)  # of the loss; beside those in `options_of`
    epochs: int = 10
    batch_size: int = 16
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-5
    head_lr: float = 1.0  # times lr, for the classifier's last layer
    loss_lr: float | None = None  # times lr, for what the loss learns (HML, ROLE); default: the loss' own
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    weight_penalty: Literal["none", "l1", "l2"] = "none"  # the L1R and L2R baselines
    penalty: float = 1e-5  # its strength
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate, step by step
    linear_epochs: int = 0  # LinearInit: this long on frozen features first, then end to end
    linear_lr: float = 1e-3
    linear_batch_size: int = 16
    pseudo_from: int = 5  # em_apl only: pseudo-negatives after each epoch from this one on (T_w)
    pseudo_share: float = 0.9  # em_apl only: of each class' unannotated labels, in all rounds together (theta)
    select: Literal["best", "last"] = "best"  # the epoch that is tested, by `metric` on the validation part
    patience: int | None = None  # stop after more than this many epochs without a new best; published EM code: 0
    drop: float | None = None  # stop when the metric is this many points below the best; published LL code: 3
    lighting: float = 0.0  # deviation of the PCA colour noise of AlexNet
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on a GPU, fp32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Multilabel:
    """`task: multilabel`: train a multi-label classifier from weak labels, test it on full ones."""

    task: str = "multilabel"
    recipe: str = "custom"  # filled in from the file's name
    metric: str = "map"  # chooses the epoch; eval/multilabel.py lists what is measured
    groups: int = 0  # also the metric of this many groups of classes, from rare to frequent in the training labels
    seeds: int = 3  # runs of a suite
    data: DataConfig = field(default_factory=DataConfig)
    # Plain images; a recipe adds what its paper adds.
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(size=448, jitter=0.0, grey=0.0, blur=0.0, scale=(0.08, 1.0))
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    options_of: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each loss on this data set

    def loss_options(self) -> dict[str, Any]:
        return {**self.options_of.get(self.training.loss, {}), **self.training.options}


def check(protocol: Multilabel) -> None:
    """Refuse what cannot work, before anything is loaded."""
    training, data = protocol.training, protocol.data
    for key, value in {
        "training.epochs": training.epochs,
        "training.batch_size": training.batch_size,
        "training.lr": training.lr,
        "training.linear_batch_size": training.linear_batch_size,
        "augment.size": protocol.augment.size,
        "seeds": protocol.seeds,
    }.items():
        if not value > 0:
            raise ConfigError(f"{key} is {value}: it must be greater than 0")
    for key, share in {
        "data.proportion": data.proportion,
        "data.validation": data.validation,
        "training.pseudo_share": training.pseudo_share,
    }.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{key} is {share}: it must lie between 0 and 1")
    if training.loss == "em_apl" and not 1 <= training.pseudo_from < training.epochs:
        raise ConfigError(
            f"training.pseudo_from is {training.pseudo_from} of {training.epochs} epochs: pseudo-labels need an epoch "
            "before them and one after, so choose a number from 1 to training.epochs - 1"
        )


TASKS: dict[str, Kind[Any]] = {
    "multilabel": Kind(Multilabel, "eval", "protocol", check, "`mls eval list NAME` lists the keys"),
}


def protocols() -> list[str]:
    """The names of the protocols that ship with mls."""
    return shipped("eval")


def load_protocol(name: str | Path, overrides: Sequence[str] = ()) -> Multilabel:
    """The protocol of a YAML file, or of one that ships with mls, and `key=value` overrides.

    >>> load_protocol("spml_scenes", ["training.loss=em"]).training.loss
    'em'
    """
    path = find(name, "eval", "protocol")
    values, _ = load_yaml(path)
    while "task" not in values and "base" in values:
        values, _ = load_yaml(find(values["base"], "eval", "protocol"))
    task = values.get("task")
    if task not in TASKS:
        raise unknown_name(f"task in {path.name}", str(task), TASKS)
    values, origins = read_yaml(path, TASKS[task])
    values.setdefault("recipe", path.stem)
    return build(TASKS[task], values, origins, overrides, path.name).config


def to_yaml(protocol: Multilabel) -> str:
    return yaml.safe_dump(_plain(asdict(protocol)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def fingerprint(protocol: Multilabel) -> str:
    """Tells two protocols apart; where the data lies and how it is loaded does not count."""
    values = _plain(asdict(protocol))
    for key in ("root", "workers", "check_sizes"):
        values["data"].pop(key)
    # Options of other losses, and what only suites use, change nothing in a run.
    values["options_of"] = protocol.loss_options()
    values["training"].pop("options")
    if protocol.training.loss != "em_apl":
        values["training"].pop("pseudo_from")
        values["training"].pop("pseudo_share")
    values.pop("seeds")
    values["model"].pop("weights")
    return hashlib.sha256(yaml.safe_dump(values, sort_keys=True).encode()).hexdigest()[:12]
