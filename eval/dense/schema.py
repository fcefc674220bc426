"""The protocols of `task: detection`, `segmentation` and of frozen maps, their defaults and their checks. Defaults are
those of the published Mask R-CNN and FCN schedules, and of open-hummingbird-eval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mls.config import limited, positive, rising, share, zero_or_more
from mls.errors import ConfigError
from mls.eval.schema import DataSetConfig


@dataclass(frozen=True)
class DenseData(DataSetConfig):
    name: str = "coco2017"
    flip: float = share(0.5)  # probability of a flipped training image


@dataclass(frozen=True)
class Schedule:
    """The training of both tasks, counted in steps."""

    steps: int = positive(90000)
    batch_size: int = positive(16)  # images per step, of all processes together
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = positive(0.02)
    layer_decay: float = limited(1.0, above=0, high=1)  # times lr, once for every stage between a layer and the heads
    momentum: float = share(0.9)
    weight_decay: float = zero_or_more(1e-4)
    norm_decay: float = zero_or_more(0.0)  # of batch normalisation; with adamw of all norms, biases, positions, tokens
    schedule: Literal["steps", "poly"] = "steps"  # poly: lr * (1 - step / steps) ** power
    falls: list[int] = limited([60000, 80000], above=0, empty=True)  # the rate is multiplied by 0.1 after each
    power: float = zero_or_more(0.9)
    min_lr: float = zero_or_more(0.0)  # final rate of poly
    warmup_steps: int = zero_or_more(1000)  # the rate rises linearly over these steps
    warmup_from: float = positive(0.001)  # from this share of the rate
    precise_bn: int = zero_or_more(200)  # batches that measure batch normalisation's statistics after training; 0: none
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class DetectionData(DenseData):
    min_sizes: list[int] = positive([640, 672, 704, 736, 768, 800])  # one is drawn per image
    test_size: int = positive(800)  # of the short side in the test
    max_size: int = positive(1333)  # of the long side: longer images are scaled down
    odd: Literal["drop", "refuse"] = "drop"  # entries of the annotations such as boxes outside (mls/data/truth.py)


@dataclass(frozen=True)
class DetectorConfig:
    """Faster R-CNN, or Mask R-CNN if `masks`. All layers are trained; heads have batch normalisation."""

    backbone: str = "resnet50"  # with `--weights random`
    weights: str = "torchvision:resnet50@IMAGENET1K_V1"  # without --weights
    neck: Literal["fpn", "c4"] = "fpn"  # c4: proposals on the last stage but one; the last is in the head
    masks: bool = True
    width: int = positive(256)  # of the feature pyramid and the convolutions of the heads
    box_width: int = positive(1024)  # of the box head's hidden layer
    anchors: list[int] = positive([32, 64, 128, 256, 512])  # fpn: one per level; c4: all on one map
    before_nms: list[int] = positive([2000, 1000])  # proposals per level, in training and test
    proposals: list[int] = positive([1000, 1000])  # after suppression, in training and test
    proposal_batch: int = positive(256)  # anchors per image in the loss of the proposals
    box_batch: int = positive(512)  # proposals per image in the loss of the boxes
    score: float = share(0.05)  # detections with a lower score are left out
    nms: float = share(0.5)
    detections: int = positive(100)  # per image


@dataclass(frozen=True)
class Detection:
    """`task: detection`: boxes, and masks where the model has them."""

    task: str = "detection"
    recipe: str = "custom"  # filled in from the file's name
    backend: Literal["torchvision", "detectron2"] = "torchvision"  # whose network and trainer are used
    metric: str = "box_ap"
    seeds: int = positive(1)
    data: DetectionData = field(default_factory=DetectionData)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    training: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True)
class SegmentationData(DenseData):
    name: str = "cityscapes"
    resize: tuple[int, int] = positive((2048, 1024))  # width, height of the scaled image; times a factor in training
    ratio: tuple[float, float] = rising((0.5, 2.0))  # range of that factor
    crop: tuple[int, int] = positive((1024, 512))  # width, height
    most: float = share(0.75)  # share of a crop that one class may cover (after ten draws: any)
    photometric: bool = True  # brightness, contrast, saturation and hue of SSD
    test: Literal["whole", "slide"] = "whole"  # slide: windows as large as the crop, their scores averaged
    stride: tuple[int, int] = positive((513, 513))  # of the windows


@dataclass(frozen=True)
class SegmenterConfig:
    """A head on the last map of a dilated backbone; in training also a small FCN on the map before it."""

    backbone: str = "resnet50"
    weights: str = "torchvision:resnet50@IMAGENET1K_V1"
    head: Literal["fcn", "pspnet", "psanet"] = "fcn"
    output_stride: int = positive(8)  # of the dilated backbone
    width: int = positive(512)
    auxiliary_width: int = positive(256)
    auxiliary_weight: float = zero_or_more(0.4)
    dropout: float = share(0.1)
    align_corners: bool = False


def poly() -> Schedule:
    """mmsegmentation's 40k schedule."""
    return Schedule(
        steps=40000,
        batch_size=8,
        lr=0.01,
        weight_decay=5e-4,
        norm_decay=5e-4,
        schedule="poly",
        falls=[],
        min_lr=1e-4,
        warmup_steps=0,
        precise_bn=0,
    )


@dataclass(frozen=True)
class Segmentation:
    """`task: segmentation`: a class for every pixel."""

    task: str = "segmentation"
    recipe: str = "custom"
    backend: Literal["torchvision", "mmseg"] = "torchvision"  # torchvision: segmenter.py, made of its parts
    metric: str = "miou"
    seeds: int = positive(3)
    data: SegmentationData = field(default_factory=SegmentationData)
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    training: Schedule = field(default_factory=poly)


Dense = Detection | Segmentation


@dataclass(frozen=True)
class FrozenDenseData(DataSetConfig):
    name: str = "scenes_regions"
    size: tuple[int, int] = limited((448, 448), low=2)  # width, height: images are squashed to it, labels follow
    images: int | None = positive(None)  # so many training images at most, drawn by the seed
    validation: float = share(0.1)  # of them, held out to choose on, where no split is published for it


@dataclass(frozen=True)
class NetworkConfig:
    backbone: str = "resnet50"  # with `--weights random`
    weights: str = "torchvision:resnet50@IMAGENET1K_V1"  # without --weights


@dataclass(frozen=True)
class MapsConfig:
    layer: str = ""  # a module, or a transformer's block by number; default: what the pooled feature is made of
    output_stride: int | None = positive(None)  # of a CNN: strides beyond it become dilations
    batch_size: int = positive(16)
    store: Literal["fp16", "fp32"] = "fp16"  # on disk
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class DenseProbeConfig:
    """Each task reads what is its own."""

    # dense_linear: fitted to convergence, or SGD, on pixels drawn from all training images alike
    solver: Literal["lbfgs", "sgd"] = "sgd"
    pixels: int = positive(100_000)
    l2: list[float] = positive([10.0**n for n in range(-6, 0)])
    lr: list[float] = positive([0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    weight_decay: list[float] = zero_or_more([0.0, 1e-5, 1e-4])
    first: int | None = positive(1)  # epochs after which the best pair of each of the two best rates goes on; null: all
    epochs: int = positive(10)
    batch_size: int = positive(256)
    # dense_knn: the first of the numbers of neighbours and of the temperatures is the table's
    k: list[int] = positive([30])
    temperature: list[float] = positive([0.02])
    shares: list[float] = limited([1.0], above=0, high=1)  # of the training images in the memory
    memory: int = positive(1_000_000)  # rows at most, drawn as open-hummingbird-eval draws them
    matcher: Literal["torch", "faiss"] = "torch"
    # dense_cluster: 0 stands for the number of classes; k-means on so many patches of the test images
    clusters: list[int] = zero_or_more([0, 500])
    patches: int = positive(50_000)
    rounds: int = positive(50)
    # objects, saliency
    discovery: Literal["lost", "tokencut"] = "lost"
    seeds: int = positive(100)  # lost: patches of low degree that a seed may grow to
    threshold: float = limited(0.2, low=-1, high=1)  # tokencut: the cosine from which two patches are joined


OWN_OPTIONS = {  # of DenseProbeConfig: those of other tasks change nothing
    "dense_linear": {"solver", "pixels", "l2", "lr", "weight_decay", "first", "epochs", "batch_size"},
    "dense_knn": {"k", "temperature", "shares", "memory", "matcher"},
    "dense_cluster": {"clusters", "patches", "rounds"},
    "objects": {"discovery", "seeds", "threshold"},
    "saliency": {"discovery", "seeds", "threshold"},
}


@dataclass(frozen=True)
class FrozenDense:
    """`task: dense_linear`, `dense_knn`, `dense_cluster`, `objects`, `saliency`: what frozen maps know of places."""

    task: str = "dense_knn"
    recipe: str = "custom"
    metric: str = "miou"
    seeds: int = positive(1)
    data: FrozenDenseData = field(default_factory=FrozenDenseData)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    features: MapsConfig = field(default_factory=MapsConfig)
    probe: DenseProbeConfig = field(default_factory=DenseProbeConfig)


def check(protocol: Dense) -> None:
    """Refuse combinations that cannot work, before anything is loaded."""
    training = protocol.training
    for key in ("before_nms", "proposals"):
        if isinstance(protocol, Detection) and len(getattr(protocol.model, key)) != 2:
            raise ConfigError(f"model.{key} needs two numbers, one for training and one for the test")
    if training.warmup_steps >= training.steps:
        raise ConfigError(f"training.warmup_steps is {training.warmup_steps} of {training.steps}: make it shorter")
    if training.schedule == "steps" and any(fall >= training.steps for fall in training.falls):
        raise ConfigError(
            f"training.falls {training.falls} lie behind the {training.steps} steps of training: scale them as well"
        )
    if isinstance(protocol, Detection) and protocol.backend == "detectron2":
        _check_detectron2(protocol)


def _check_detectron2(protocol: Detection) -> None:
    """Refuse settings that detectron2 does not have."""
    data, training = protocol.data, protocol.training
    if data.flip not in (0.0, 0.5):
        raise ConfigError(f"data.flip is {data.flip}: detectron2 mirrors half of the images or none, set 0.5 or 0")
    if training.schedule != "steps":
        raise ConfigError(f"training.schedule={training.schedule} is not detectron2's: set training.schedule=steps")
