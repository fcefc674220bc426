"""Protocols: a downstream evaluation as YAML (configs/eval/), of which `task` says what is done. The dataclasses here
are the only place where a default of a protocol stands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mls import yaml_files
from mls.config import AugmentConfig, limited, positive, share, zero_or_more
from mls.errors import ConfigError, unknown_name
from mls.eval.dense import schema as dense
from mls.eval.dense.schema import OWN_OPTIONS, Detection, FrozenDense, Segmentation
from mls.eval.schema import DataSetConfig
from mls.recipes import Kind, build, find, read_yaml, shipped, with_bases


@dataclass(frozen=True)
class DataConfig(DataSetConfig):
    # One's own labels (eval/data/table.py): a .csv or .parquet file of `table`, a text list of `folder`
    labels_file: str | None = None
    answers: str | None = None  # a filled-in list of `mls labels doctor`, which stands above the table
    classes: tuple[str, ...] = ()  # columns of a table that are classes; default: all that are left
    zero: Literal["auto", "absent", "unknown"] = "auto"  # what 0 says; auto: absent, unless the table has -1 for that
    blank: Literal["unknown", "absent"] = "unknown"  # what a cell without a value says
    seed: int = limited(1200, low=0, high=2**32 - 1)  # of the split and of drawn labels: the papers' number
    validation: float = share(0.2)  # share of train held out to choose on, where no split is published for it
    shots: int | None = positive(None)  # train on so many images a class; the run's seed is the draw
    fraction: float = limited(1.0, above=0, high=1)  # train on this share of the labelled images, drawn likewise
    test_crop: Literal["squash", "centre"] = "squash"  # the whole image scaled to a square, or its middle square
    test_resize: float = limited(1.0, low=1)  # centre: the short side is this many times augment.size before the crop


@dataclass(frozen=True)
class TrainingData(DataConfig):
    labels: Literal["full", "one_positive_all_negatives", "single_positive", "partial_positives", "partial_labels"] = (
        "full"  # what the training sees of the truth (eval/regimes.py)
    )
    proportion: float = share(0.5)  # of the partial regimes
    train_crop: Literal["squash", "random"] = "squash"  # squash, or a random resized crop


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = "scratch:resnet50"  # what `--weights random` builds
    weights: str = "torchvision:resnet50@IMAGENET1K_V1"  # where no --weights are given: the paper's


@dataclass(frozen=True)
class TrainingConfig:
    loss: str = "an"  # softmax: cross-entropy, where every image has one label
    options: dict[str, Any] = field(default_factory=dict)  # of the loss; beside those in `options_of`
    prior_scores: str | None = None  # a .npy file of the training images' class scores, for losses that take any
    boost: float = limited(1.0, low=1)  # BoostLU: positive class activations count this many times
    ignore_unknown: bool = False  # labels that nobody annotated are left out, whatever the loss makes of them
    epochs: int = positive(10)
    batch_size: int = positive(16)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = positive(1e-5)
    head_lr: float = zero_or_more(1.0)  # times lr, for the classifier's last layer
    layer_decay: float = limited(1.0, above=0, high=1)  # times lr, once for every stage between a layer and the head
    loss_lr: float | None = zero_or_more(None)  # times lr, for what the loss learns (HML, ROLE); default: the loss' own
    momentum: float = share(0.9)
    nesterov: bool = False
    weight_decay: float = zero_or_more(0.0)
    weight_penalty: Literal["none", "l1", "l2"] = "none"  # the L1R and L2R baselines
    penalty: float = zero_or_more(1e-5)  # its strength
    schedule: Literal["constant", "cosine", "steps"] = "constant"  # of the learning rate, step by step
    steps: list[int] = limited([], above=0, empty=True)  # the epochs after which `steps` divides it by ten
    warmup_epochs: float = zero_or_more(0.0)  # the rate rises from nothing
    train: Literal["all", "head"] = "all"  # head: the backbone stays as it is (MoCo's linear evaluation)
    batch_norm: Literal["train", "frozen"] = "train"  # frozen: statistics and affine parameters stay the pretrained
    mixup: float = zero_or_more(0.0)  # alpha of https://arxiv.org/abs/1710.09412
    rand_augment: int = zero_or_more(0)  # operations an image, at magnitude 9, of https://arxiv.org/abs/1909.13719
    linear_epochs: int = zero_or_more(0)  # LinearInit: this long on frozen features first, then end to end
    linear_lr: float = positive(1e-3)
    linear_batch_size: int = positive(16)
    linear_select: Literal["last", "best"] = "last"  # best: LinearInit as published, its best epoch on validation
    pseudo_from: int = zero_or_more(5)  # soft labels after each epoch from this one on (T_w), of em_apl
    pseudo_share: float = share(0.9)  # to so many of each class' unannotated labels, in all rounds together (theta)
    # The epoch that is tested: the best by `metric` on the validation part, fully labelled or as weakly as the rest.
    select: Literal["best", "last", "weak"] = "best"
    patience: int | None = zero_or_more(None)  # stop after more than this many epochs without a best; EM code: 0
    drop: float | None = zero_or_more(None)  # stop when the metric is this many points below the best; LL code: 3
    lighting: float = zero_or_more(0.0)  # deviation of the PCA colour noise of AlexNet
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on a GPU, fp32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"


# Plain images; a recipe adds what its paper adds.
def plain(size: int) -> AugmentConfig:
    return AugmentConfig(size=size, jitter=0.0, grey=0.0, blur=0.0, scale=(0.08, 1.0))


@dataclass(frozen=True)
class Supervised:
    """`task: multilabel` and `task: finetune`: train a classifier, from weak labels or from full ones, and test it."""

    task: str = "multilabel"
    recipe: str = "custom"  # filled in from the file's name
    metric: str = "map"  # chooses the epoch; eval/supervised.py lists what is measured
    groups: int = zero_or_more(0)  # also the metric of so many groups of classes, from rare to frequent in training
    seeds: int = positive(3)  # runs of a suite
    data: TrainingData = field(default_factory=TrainingData)
    augment: AugmentConfig = field(default_factory=lambda: plain(448))
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    options_of: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each loss on this data set

    def loss_options(self) -> dict[str, Any]:
        return {**self.options_of.get(self.training.loss, {}), **self.training.options}


@dataclass(frozen=True)
class FrozenData(DataConfig):
    validation: float = share(0.2)  # only linear and svm choose anything
    test_crop: Literal["squash", "centre"] = "centre"
    test_resize: float = limited(256 / 224, low=1)
    train_crop: Literal["squash", "random"] = "random"  # of the augmented passes


@dataclass(frozen=True)
class FeaturesConfig:
    passes: int = zero_or_more(0)  # augmented passes over the training images, beside the plain one
    batch_size: int = positive(64)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class ProbeConfig:
    """Of `task: linear`, `knn` and `svm`; each reads what is its own."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"  # linear: fitted to convergence, or SGD as in MoCo's linear evaluation
    l2: list[float] = positive([10.0**n for n in range(-7, 1)])  # lbfgs: penalties to try
    lr: list[float] = positive([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])  # sgd: learning rates to try
    weight_decay: list[float] = zero_or_more([0.0, 1e-5, 1e-4])  # sgd: weight decays to try
    epochs: int = positive(100)
    batch_size: int = positive(256)
    schedule: Literal["cosine", "steps"] = "cosine"  # steps: a tenth after 60 and 80 per cent, as in MoCo
    k: list[int] = positive([1, 5, 10, 20, 50, 100, 200])  # knn: neighbours to try
    temperature: float = positive(0.07)  # knn: of the votes
    costs: list[float] = positive([2.0**n for n in range(-19, -3)])  # svm: C to try
    folds: int = limited(3, low=2)  # svm: of the cross-validation that chooses C for each class


@dataclass(frozen=True)
class Frozen:
    """`task: linear`, `knn` and `svm`: what frozen features know."""

    task: str = "linear"
    recipe: str = "custom"
    metric: str = "top1"  # chooses the setting, on a part of the training images; map where images have many labels
    seeds: int = positive(1)
    data: FrozenData = field(default_factory=FrozenData)
    augment: AugmentConfig = field(default_factory=lambda: plain(224))  # only features.passes augments
    model: ModelConfig = field(default_factory=ModelConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


Classification = Supervised | Frozen
AnyProtocol = Classification | Detection | Segmentation | FrozenDense


def check(protocol: Classification | FrozenDense) -> None:
    """Refuse combinations that cannot work, before anything is loaded."""
    if isinstance(protocol, FrozenDense):
        return
    if protocol.data.shots and protocol.data.fraction < 1:
        raise ConfigError("data.shots and data.fraction both say how many images are learnt from: set one of them")
    if isinstance(protocol, Supervised):
        _check_training(protocol.training)
    elif protocol.task == "svm" and protocol.features.passes:
        raise ConfigError(
            "features.passes is for task linear and knn: an SVM is chosen by cross-validation, which would learn from "
            "views of the images that it holds out: set it to 0"
        )


def _check_training(training: TrainingConfig) -> None:
    if training.warmup_epochs >= training.epochs:
        raise ConfigError(
            f"training.warmup_epochs is {training.warmup_epochs:g} of {training.epochs} epochs: make it shorter"
        )
    if training.schedule == "steps" and not any(0 < epoch < training.epochs for epoch in training.steps):
        raise ConfigError(
            f"training.schedule=steps with training.steps={training.steps} never lowers the rate in "
            f"{training.epochs} epochs: set training.steps, for example [60,80] of 100"
        )
    if training.nesterov and training.optimizer == "sgd" and training.momentum == 0:
        raise ConfigError("training.nesterov=true needs a momentum: raise training.momentum above 0")
    if training.train == "head" and training.linear_epochs:
        raise ConfigError("training.train=head trains the last layer alone anyway: set training.linear_epochs=0")
    if training.boost != 1 and training.linear_epochs:
        raise ConfigError("training.boost needs maps, which LinearInit has not: set training.linear_epochs=0")


def _kind(schema: type[Any], check: Callable[[Any], None] = check) -> Kind[Any]:
    return Kind(schema, "eval", "protocol", check, "`mls eval list NAME` lists the keys")


TASKS: dict[str, Kind[Any]] = {
    "multilabel": _kind(Supervised),
    "finetune": _kind(Supervised),
    "linear": _kind(Frozen),
    "knn": _kind(Frozen),
    "svm": _kind(Frozen),
    "detection": _kind(Detection, dense.check),
    "segmentation": _kind(Segmentation, dense.check),
    "dense_linear": _kind(FrozenDense),
    "dense_knn": _kind(FrozenDense),
    "dense_cluster": _kind(FrozenDense),
    "objects": _kind(FrozenDense),
    "saliency": _kind(FrozenDense),
}


def protocols() -> list[str]:
    """The names of the protocols that ship with mls."""
    return shipped("eval")


def load_protocol(name: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The protocol of a YAML file, or of one that ships with mls, and `key=value` overrides.

    >>> load_protocol("spml_scenes", ["training.loss=em"]).training.loss
    'em'
    """
    path = find(name, "eval", "protocol")
    task = next((values["task"] for _, values, _ in with_bases(path, TASKS["linear"]) if "task" in values), None)
    if not isinstance(task, str) or task not in TASKS:
        raise unknown_name(f"task in {path.name}", str(task), TASKS)
    values, origins = read_yaml(path, TASKS[task])
    values.setdefault("recipe", path.stem)
    return build(TASKS[task], values, origins, overrides, path.name).config


def to_yaml(protocol: AnyProtocol) -> str:
    return yaml_files.dump(_plain(asdict(protocol)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def scenes_identity(scenes: dict[str, Any]) -> dict[str, Any]:
    """Of data.scenes what tells them apart: younger keys where they are set, and of a folder that there is one, since
    the hash of the images says the rest."""
    younger = {"style": "standard", "objects": None}
    found = {key: value for key, value in scenes.items() if key not in younger or value != younger[key]}
    return found | ({"objects": True} if "objects" in found else {})


def _whole_pixels(protocol: FrozenDense) -> bool:
    """Is each pixel of a mask drawn, a whole number of times?"""
    whole = not any(side % protocol.data.scenes.size for side in protocol.data.size)
    return protocol.data.name.startswith("scenes_") and whole


def fingerprint(protocol: AnyProtocol) -> str:
    """Tells two protocols apart; where the data lies and how it is loaded does not count."""
    from mls.core.losses import LOSSES  # loads torch, which a list of protocols does without
    from mls.eval import prior_scores

    values = _plain(asdict(protocol))
    # Which labels are read tells the content of the data.
    of_place = ("root", "workers", "check_sizes", "odd", "max_unreadable")
    for key in (*of_place, "labels_file", "answers", "classes", "zero", "blank"):
        values["data"].pop(key, None)
    values["data"]["scenes"] = scenes_identity(values["data"]["scenes"])
    if values["data"].get("fraction") == 1:  # a key that is younger than stored results
        values["data"].pop("fraction")
    if isinstance(protocol, Detection | Segmentation):  # keys that are younger than stored results
        for key, default in {"optimizer": "sgd", "layer_decay": 1.0}.items():
            if values["training"][key] == default:
                values["training"].pop(key)
    # Options of other losses, and what only suites use, change nothing in a run.
    if isinstance(protocol, Supervised):
        values["options_of"] = protocol.loss_options()
        values["training"].pop("options")
        younger = {"ignore_unknown": False, "linear_select": "last", "boost": 1.0, "prior_scores": None}
        for key, default in younger.items():  # than stored results
            if values["training"][key] == default:
                values["training"].pop(key)
        if protocol.training.prior_scores:
            values["training"]["prior_scores"] = prior_scores.content(protocol.training.prior_scores)
        if LOSSES[protocol.training.loss].relabels != "epoch":
            values["training"].pop("pseudo_from")
            values["training"].pop("pseudo_share")
    if isinstance(protocol, FrozenDense):
        own = set(OWN_OPTIONS[protocol.task])
        if protocol.probe.solver == "lbfgs" or protocol.probe.first is None:
            own.discard("first")  # a key that is younger than stored results
        values["probe"] = {key: values["probe"][key] for key in sorted(own)}
        if protocol.task != "objects" and not _whole_pixels(protocol):  # they once took other pixels of a mask
            values["squashed"] = "nearest-exact"
    values.pop("seeds")
    values["model"].pop("weights")
    return hashlib.sha256(yaml.safe_dump(values, sort_keys=True).encode()).hexdigest()[:12]
