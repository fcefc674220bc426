"""Protocols in mmsegmentation's words: its published configurations but for what is listed here, and our schedule."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mls.eval import load_protocol
from mls.eval.dense import mmseg_config
from mls.eval.dense.loop import lr_share
from mls.eval.dense.schema import Schedule, Segmentation
from mls.frameworks import installed as frameworks

if frameworks.missing("mmseg"):
    pytest.skip('mmsegmentation is not installed: pip install "mls[mmseg]"', allow_module_level=True)
with frameworks.quiet():
    frameworks.load("mmseg")
    from mmengine.config import Config
    from mmengine.optim import OptimWrapper
    from mmengine.registry import PARAM_SCHEDULERS

CPU = torch.device("cpu")


SHIPPED = {
    "cityscapes_psanet": ("psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024", 19),
    "cityscapes_pspnet": ("pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024", 19),
    "cityscapes_fcn": ("fcn/fcn_r50-d8_4xb2-40k_cityscapes-769x769", 19),
    "voc12aug_fcn": ("fcn/fcn_r50-d8_4xb4-20k_voc12aug-512x512", 21),
    "ade20k_fcn": ("fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512", 150),
}
NONE = "not there"
# What differs from the published configurations, and why: ours, theirs.
DIFFERENCES = {
    # our weights are of a plain ResNet, and come from a file
    "model.backbone.type": ("ResNet", "ResNetV1c"),
    "model.backbone.init_cfg.type": ("Pretrained", NONE),
    "model.backbone.init_cfg.checkpoint": ("backbone.pth", NONE),
    "model.pretrained": (None, "open-mmlab://resnet50_v1c"),
    # one process on a CPU; SyncBN on several GPUs
    "model.backbone.norm_cfg.type": ("BN", "SyncBN"),
    "model.decode_head.norm_cfg.type": ("BN", "SyncBN"),
    "model.auxiliary_head.norm_cfg.type": ("BN", "SyncBN"),
    # one reader for all layouts; ours has moved ADE20K's void already
    "train_pipeline.0.type": ("LoadRegionImage", "LoadImageFromFile"),
    "train_pipeline.1.type": ("LoadRegionLabels", "LoadAnnotations"),
    "test_pipeline.0.type": ("LoadRegionImage", "LoadImageFromFile"),
    "test_pipeline.2.type": ("LoadRegionLabels", "LoadAnnotations"),
    # tested once, at the end, and not rounded; the processes have met before
    "train_cfg.val_interval": (NONE, "any"),
    "test_evaluator.type": ("UnroundedIoUMetric", "IoUMetric"),
    "env_cfg.dist_cfg.backend": (NONE, "nccl"),
}
ALSO = {
    "ade20k_fcn": {
        "train_pipeline.1.reduce_zero_label": (NONE, True),
        "test_pipeline.2.reduce_zero_label": (NONE, True),
    },
    # There small images are filled up with black; elsewhere, and here, with the mean colour.
    "voc12aug_fcn": {
        "train_pipeline.6.type": ("PackSegInputs", "Pad"),
        "train_pipeline.6.size": (NONE, (512, 512)),
        "train_pipeline.7.type": (NONE, "PackSegInputs"),
    },
}


def described(protocol: Segmentation, classes: int) -> dict[str, Any]:
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    start = mmseg_config.Start(mmseg_config.ResNetPlan.of("resnet50"), mean, std, "backbone.pth")
    return mmseg_config.configuration(protocol, start, classes, CPU)


def shipped(name: str) -> Any:
    folder = Path(frameworks.load("mmseg").__file__).parent / ".mim" / "configs"
    with frameworks.quiet():
        return Config.fromfile(folder / f"{name}.py")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_protocol_is_mmsegmentations_published_configuration(name: str) -> None:
    file, classes = SHIPPED[name]
    theirs, protocol = shipped(file), load_protocol(name, ["backend=mmseg"])
    ours = described(protocol, classes=classes)
    if "train_pipeline" not in theirs:
        theirs.train_pipeline = theirs.train_dataloader.dataset.pipeline
    one, other = dict(flat(ours)), dict(flat({key: theirs[key] for key in ours}))
    differing = {
        key: (one.get(key, NONE), other.get(key, NONE))
        for key in one | other
        if one.get(key, NONE) != other.get(key, NONE)
    }
    if "train_cfg.val_interval" in differing:
        differing["train_cfg.val_interval"] = (NONE, "any")
    assert differing == DIFFERENCES | ALSO.get(name, {})
    processes = int(file.split("_")[2].partition("xb")[0])
    assert protocol.training.batch_size == processes * theirs.train_dataloader.batch_size


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf under its path; pairs of numbers are leaves."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from flat(inside, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inside in enumerate(value):
            yield from flat(inside, f"{path}.{number}")
    else:
        yield path, tuple(value) if isinstance(value, list | tuple) else value


# Every field of the schema, and a value of it that must change mmsegmentation's configuration.
CHANGES = {
    "data": {"flip": 0.1, "resize": "[64,48]", "ratio": "[0.9,1.1]", "crop": "[64,48]", "most": 0.6}
    | {"photometric": "false", "test": "slide"},
    "model": {"head": "psanet", "output_stride": 16, "width": 24, "auxiliary_width": 24, "auxiliary_weight": 0.3}
    | {"dropout": 0.3, "align_corners": "true"},
    "training": {"steps": 99, "lr": 0.3, "momentum": 0.3, "weight_decay": 0.3, "norm_decay": 0.3, "schedule": "steps"}
    | {"power": 0.3, "min_lr": 0.003, "warmup_steps": 3, "optimizer": "adamw", "layer_decay": 0.5},
}
BESIDE = {  # only with another one
    "data.stride=[3,3]": "data.test=slide",
    "training.warmup_from=0.3": "training.warmup_steps=3",
    "training.falls=[3]": "training.schedule=steps",
}
# Which images there are, who reads them, how many a step, which weights: with_mmseg.py. Refused: check.
ELSEWHERE = {
    "data": {"name", "root", "check_sizes", "max_unreadable", "workers", "scenes"},
    "model": {"backbone", "weights"},
}
ELSEWHERE |= {"training": {"batch_size", "precise_bn", "precision", "device"}}


def test_no_field_of_a_protocol_is_left_out_silently() -> None:
    keys_of = lambda *overrides: dict(flat(described(load_protocol("cityscapes_pspnet", overrides), 19)))
    for section, values in CHANGES.items():
        beside = {key.partition("=")[0].partition(".")[2] for key in BESIDE if key.startswith(section)}
        fields = {field.name for field in dataclasses.fields(getattr(Segmentation(), section))}
        assert fields == values.keys() | beside | ELSEWHERE[section]
        for key, value in values.items():
            assert keys_of(f"{section}.{key}={value}") != keys_of(), key
    for change, other in BESIDE.items():
        assert keys_of(change, other) != keys_of(other), change


@pytest.mark.parametrize("schedule", ["poly", "steps"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_moves_as_in_our_loop(schedule: Any, warmup: int) -> None:
    steps = 100 if schedule == "poly" else 10
    training = Schedule(steps, schedule=schedule, warmup_steps=warmup, falls=[5, 8], warmup_from=0.1, min_lr=1e-4)
    optimizer = torch.optim.SGD([torch.zeros(1)], training.lr)
    with frameworks.quiet():
        wrapped = OptimWrapper(optimizer)
        schedulers = [
            PARAM_SCHEDULERS.build({**one, "optimizer": wrapped}) for one in mmseg_config.param_scheduler(training)
        ]
        for step in range(1, steps + 1):
            # mmsegmentation's poly ends a step earlier, and begins only where the warm-up has ended.
            slack = (2 + 2 * warmup) / steps if schedule == "poly" and step > warmup else 1e-9
            assert optimizer.param_groups[0]["lr"] / training.lr == pytest.approx(lr_share(training, step), abs=slack)
            for scheduler in schedulers:
                scheduler.step()
