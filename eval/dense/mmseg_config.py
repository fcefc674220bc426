"""A protocol of `task: segmentation` as a configuration of mmsegmentation, with the keys of its own configurations
(mmseg/.mim/configs) in their order. What mmsegmentation cannot do is refused here; with_mmseg.py trains with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mls import distributed
from mls.data.pictures import VOID
from mls.errors import ConfigError
from mls.eval.dense.heads import POOL_SIZES
from mls.eval.dense.loop import check_batch_size, check_precision
from mls.eval.dense.psanet import SHRINK, WINDOW
from mls.eval.dense.schema import Schedule, Segmentation, SegmentationData
from mls.frameworks import mmseg_network
from mls.frameworks.mmseg_network import STRIDES
from mls.frameworks.resnet_plan import ResNetPlan
from mls.models.momentum import precision_on

Config = dict[str, Any]

HEADS: dict[str, Config] = {
    "fcn": {"type": "FCNHead", "num_convs": 2, "concat_input": True},
    "pspnet": {"type": "PSPHead", "pool_scales": POOL_SIZES},
    "psanet": {
        "type": "PSAHead",
        "mask_size": WINDOW,
        "psa_type": "bi-direction",
        "compact": False,
        "shrink_factor": SHRINK,
        "normalization_factor": 1.0,
        "psa_softmax": True,
    },
}
# bf16 needs no loss scaling: its range is that of fp32.
AMP = {"bf16": {"dtype": "bfloat16", "loss_scale": 1.0}, "fp16": {"dtype": "float16", "loss_scale": "dynamic"}}


@dataclass(frozen=True)
class OurTrunk:
    """A network that mmsegmentation does not have: OurBackbone of mmseg_parts.py puts ours there."""

    architecture: str
    channels: list[int]  # of its maps
    patch: tuple[int, int]  # of a transformer; of others (1, 1)


@dataclass(frozen=True)
class Start:
    """The backbone that training starts from, as a file that mmsegmentation reads."""

    network: ResNetPlan | OurTrunk
    mean: list[float]  # of pixels from 0 to 255
    std: list[float]
    checkpoint: str

    @property
    def channels(self) -> list[int]:
        if isinstance(self.network, OurTrunk):
            return self.network.channels
        return [self.network.dim // 2 ** (3 - stage) for stage in range(4)]


def check(protocol: Segmentation, device: torch.device) -> None:
    """Refuse settings of the protocol that mmsegmentation does not have."""
    training = protocol.training
    if training.precise_bn:
        raise ConfigError(
            f"training.precise_bn is {training.precise_bn}, which mmsegmentation does not have: set it to 0"
        )
    if training.norm_decay and not training.weight_decay:
        raise ConfigError(
            "mmseg takes training.norm_decay as a multiple of training.weight_decay, which is 0: set both or none"
        )
    if training.layer_decay < 1 and training.schedule == "poly" and training.min_lr:
        raise ConfigError(
            "mmseg's poly ends at training.min_lr in all layers alike: set training.min_lr=0, or training.layer_decay=1"
        )
    check_batch_size(training)
    if device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "mmsegmentation takes the GPU that it sees: for training.device=cpu set CUDA_VISIBLE_DEVICES="
        )
    check_precision(training, device, "mmsegmentation")


def configuration(protocol: Segmentation, start: Start, classes: int, device: torch.device) -> Config:
    data, training = protocol.data, protocol.training
    return {
        "model": model(protocol, start, classes, device),
        "train_pipeline": train_pipeline(data),
        "test_pipeline": [
            {"type": "LoadRegionImage"},
            {"type": "Resize", "scale": data.resize, "keep_ratio": True},
            {"type": "LoadRegionLabels"},
            {"type": "PackSegInputs"},
        ],
        "optim_wrapper": optim_wrapper(training, device, isinstance(start.network, OurTrunk)),
        "param_scheduler": param_scheduler(training),
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": training.steps},
        "test_cfg": {"type": "TestLoop"},
        "test_evaluator": {"type": "UnroundedIoUMetric", "iou_metrics": ["mIoU"]},
        "env_cfg": {"cudnn_benchmark": True, "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0}},
        "default_scope": "mmseg",
    }


def model(protocol: Segmentation, start: Start, classes: int, device: torch.device) -> Config:
    settings = protocol.model
    synced = distributed.world() > 1 and device.type == "cuda"  # one process needs none, and CPUs have none
    norm_cfg = {"type": "SyncBN" if synced else "BN", "requires_grad": True}
    head = {"dropout_ratio": settings.dropout, "num_classes": classes, "norm_cfg": norm_cfg}
    head |= {"align_corners": settings.align_corners}
    last = len(start.channels) - 1
    before = max(last - 1, 0)
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            **mmseg_network.preprocessor(start.mean, start.std),
            "pad_val": 0,
            "seg_pad_val": VOID,
            "size": turned(protocol.data.crop),
            **whole_patches(protocol, start),
        },
        "pretrained": None,
        "backbone": backbone(start, settings.output_stride, norm_cfg),
        "decode_head": {
            **HEADS[settings.head],
            "in_channels": start.channels[last],
            "in_index": last,
            "channels": settings.width,
            **head,
            "loss_decode": cross_entropy(1.0),
        },
        "auxiliary_head": {
            "type": "FCNHead",
            "in_channels": start.channels[before],
            "in_index": before,
            "channels": settings.auxiliary_width,
            "num_convs": 1,
            "concat_input": False,
            **head,
            "loss_decode": cross_entropy(settings.auxiliary_weight),
        },
        "train_cfg": {},
        "test_cfg": test_cfg(protocol.data),
    }


def whole_patches(protocol: Segmentation, start: Start) -> Config:
    """A transformer takes whole patches: test images are filled up to them, and scores of the filling are cut off."""
    if not isinstance(start.network, OurTrunk) or start.network.patch == (1, 1):
        return {}
    patch = start.network.patch
    if any(side % part for side, part in zip(turned(protocol.data.crop), patch, strict=True)):
        raise ConfigError(
            f"data.crop is {list(protocol.data.crop)}, and {start.network.architecture} has patches of {patch[0]} "
            "pixels: mmsegmentation takes whole ones, so give multiples"
        )
    return {"test_cfg": {"size_divisor": math.lcm(*patch)}}


def backbone(start: Start, output_stride: int, norm_cfg: Config) -> Config:
    init_cfg = mmseg_network.pretrained(start.checkpoint)
    if isinstance(start.network, OurTrunk):
        facts = {"architecture": start.network.architecture, "output_stride": output_stride}
        return {"type": "OurBackbone", **facts, "synced": norm_cfg["type"] == "SyncBN", "init_cfg": init_cfg}
    if output_stride not in STRIDES:
        raise ConfigError(f"model.output_stride is {output_stride}: choose one of {', '.join(map(str, STRIDES))}")
    return {
        **mmseg_network.network(start.network),
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        **STRIDES[output_stride],
        "norm_cfg": norm_cfg,
        "norm_eval": False,
        "contract_dilation": True,
        "init_cfg": init_cfg,
    }


def test_cfg(data: SegmentationData) -> Config:
    if data.test == "whole":
        return {"mode": "whole"}
    return {"mode": "slide", "crop_size": turned(data.crop), "stride": turned(data.stride)}


def cross_entropy(weight: float) -> Config:
    return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}


def train_pipeline(data: SegmentationData) -> list[Config]:
    return [
        {"type": "LoadRegionImage"},
        {"type": "LoadRegionLabels"},
        {"type": "RandomResize", "scale": data.resize, "ratio_range": data.ratio, "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": turned(data.crop), "cat_max_ratio": data.most},
        {"type": "RandomFlip", "prob": data.flip},
        *([{"type": "PhotoMetricDistortion"}] if data.photometric else []),
        {"type": "PackSegInputs"},
    ]


def turned(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height), the order of scales, to (height, width), the order of crops."""
    return size[1], size[0]


def optim_wrapper(training: Schedule, device: torch.device, ours: bool) -> Config:
    precision = precision_on(device, training.precision, "training.precision")
    sgd = {"type": "SGD", "lr": training.lr, "momentum": training.momentum, "weight_decay": training.weight_decay}
    kind = "AmpOptimWrapper" if precision in AMP else "OptimWrapper"
    wrapper: Config = {"type": kind, **AMP.get(precision, {}), "optimizer": sgd, "clip_grad": None}
    if ours or (training.optimizer, training.layer_decay) != ("sgd", 1.0):
        return {**wrapper, "constructor": "OurOptimizer", "paramwise_cfg": {"schedule": training}}
    if training.norm_decay != training.weight_decay:
        wrapper["paramwise_cfg"] = {"norm_decay_mult": training.norm_decay / training.weight_decay}
    return wrapper


def param_scheduler(training: Schedule) -> list[Config]:
    """After a warm-up `poly` starts at its full rate, as mmsegmentation's configurations have it; ours has fallen a
    little by then."""
    warmup = training.warmup_steps
    # The factor is 1 at `end`.
    rising = {"type": "LinearLR", "start_factor": training.warmup_from, "begin": 0, "end": warmup + 1}
    poly = {"type": "PolyLR", "eta_min": training.min_lr, "power": training.power}
    poly |= {"begin": warmup, "end": training.steps}
    steps = {"type": "MultiStepLR", "milestones": training.falls, "gamma": 0.1}
    schedules = [*([rising] if warmup else []), poly if training.schedule == "poly" else steps]
    return [{**schedule, "by_epoch": False} for schedule in schedules]
