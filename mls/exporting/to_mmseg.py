"""mmsegmentation: `backbone.pth`, whose names are torchvision's there too, and a configuration that lays the backbone
and its colours over any of mmsegmentation's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mls.errors import ConfigError
from mls.exporting import settings
from mls.exporting.certify import Loaded, blank
from mls.exporting.restated import BLOCKS, RestatedResNet
from mls.exporting.source import NoCounterpart, Pixels, ResNetPlan, Source, Stages, normalised, stages_of
from mls.exporting.to_torchvision import FILE, plan_of
from mls.frameworks import installed as frameworks
from mls.models import foreign
from mls.models.resnet_names import to_detectron2

RECIPE = "mmseg_config.py"
WHOLE = {"strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1)}  # the network as it was pretrained; heads dilate it
CONFIG = """# mmsegmentation: {architecture} of {path}, all layers trained.
# `_base_` is any configuration of mmsegmentation with a ResNet of this depth: edit this line to change head or data.
_base_ = '{base}'
# Without mmcv's compiled operators (mmcv-lite) mls brings a stand-in, with all that FCN, PSPNet and PSANet need.
# And it reads checkpoints safely: with torch's default mmengine cannot resume its own.
custom_imports = dict(
    imports=['mls.frameworks.mmcv_lite', 'mls.frameworks.mmengine_checkpoints'], allow_failed_imports=True
)
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean={mean},
    std={std},
    bgr_to_rgb=True,  # mmcv reads images as BGR, the backbone has seen RGB
)
model = dict(
    pretrained=None,  # else the base's own weights would be loaded as well
    data_preprocessor=data_preprocessor,
    backbone=dict(  # not ResNetV1c, whose first layers are others
{network}        style='pytorch',  # the stride is in the 3x3 convolution
        init_cfg=dict(type='Pretrained', checkpoint='{{{{ fileDirname }}}}/backbone.pth'),
    ),
)
"""


def write(source: Source, folder: Path, final: Path) -> list[str]:
    plan = plan_of(source, "mmseg")
    if plan.name.startswith("wide_"):
        raise NoCounterpart(f"mmseg has no network with the layers of {plan.name}: leave mmseg out of --to")
    torch.save(dict(source.backbone.state_dict()), folder / FILE)
    text = CONFIG.format(
        architecture=source.architecture,
        path=source.path,
        base=_base(plan),
        mean=source.mean,
        std=source.std,
        network="".join(f"        {key}={value!r},\n" for key, value in network(plan).items()),
    )
    (folder / RECIPE).write_text(text)
    return [RECIPE]


def network(plan: ResNetPlan) -> dict[str, Any]:
    """
    >>> network(ResNetPlan.of("resnet18"))
    {'type': 'ResNet', 'depth': 18}
    """
    if plan.groups == 1:
        return {"type": "ResNet", "depth": plan.depth}
    return {"type": "ResNeXt", "depth": plan.depth, "groups": plan.groups, "base_width": plan.width}


def _base(plan: ResNetPlan) -> str:
    """mmsegmentation's FCN for Cityscapes with heads of the right width: where it is installed, its file."""
    depth = {True: min(plan.depth, 101), False: 18}[plan.bottleneck]
    name = f"fcn/fcn_r{depth}-d8_4xb2-{80 if depth == 18 else 40}k_cityscapes-769x769.py"
    if frameworks.missing("mmseg"):
        return f"mmseg::{name}"
    return str(Path(frameworks.load("mmseg").__file__ or "").parent / ".mim" / "configs" / name)


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    """Only what this very file says is known; the rest is mmsegmentation's default, as in a file without a base."""
    said = settings.read_python(recipe) if recipe else {}
    tensors = foreign.read(file)  # refuses what would run code, before anything else opens it
    model = said.get("model", {})
    backbone = {
        "type": "ResNet",
        "depth": plan_of(source, "mmseg").depth,
        "style": "pytorch",
        **model.get("backbone", {}),
    }
    colours = {"type": "SegDataPreProcessor", **model.get("data_preprocessor", said.get("data_preprocessor", {}))}
    if frameworks.missing("mmseg"):
        return _restated(file, recipe, backbone, colours, tensors)
    return _real(file, recipe, backbone, colours)


def _real(file: Path, recipe: Path | None, backbone: dict[str, Any], colours: dict[str, Any]) -> Loaded:
    frameworks.load("mmseg")
    with frameworks.quiet():
        from mmseg.registry import MODELS

        prefix = backbone.get("init_cfg", {}).get("prefix")
        init = {"type": "Pretrained", "checkpoint": str(file)} | ({"prefix": prefix} if prefix else {})
        network = MODELS.build({**backbone, **WHOLE, "init_cfg": init})
        blank(network)
        network.init_weights()
        network.eval()
        preprocessor = MODELS.build(colours)

    def stages(pixels: Pixels) -> Stages:
        read_by_mmcv = list(pixels.flip(1))  # BGR
        with torch.no_grad():
            images = preprocessor({"inputs": read_by_mmcv})["inputs"]
        return stages_of(network, torch.stack(list(images)))

    return Loaded(file, recipe, f"mmsegmentation {frameworks.version('mmseg')}", network.state_dict(), stages)


def _restated(
    file: Path, recipe: Path | None, backbone: dict[str, Any], colours: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Loaded:
    if backbone["type"] not in ("ResNet", "ResNeXt") or backbone["depth"] not in BLOCKS:
        raise ConfigError(
            f"{recipe} builds {backbone['type']}, which is no plain ResNet: set type='ResNet' in backbone"
        )
    plan = ResNetPlan("of the recipe", backbone["depth"], backbone.get("groups", 1), _width(backbone))
    network = RestatedResNet(plan, stride_in_1x1=backbone["style"] == "caffe")
    prefix = backbone.get("init_cfg", {}).get("prefix") or ""
    held = network.take(tensors, lambda name: to_detectron2(name.removeprefix(prefix)))

    def stages(pixels: Pixels) -> Stages:
        seen = pixels if colours.get("bgr_to_rgb") else pixels.flip(1)
        return network.stages(normalised(seen, colours.get("mean") or [0.0] * 3, colours.get("std") or [1.0] * 3))

    return Loaded(file, recipe, "mls's restatement of mmseg's ResNet (mmsegmentation is not installed)", held, stages)


def _width(backbone: dict[str, Any]) -> int:
    return backbone.get("base_width", 4) if backbone["type"] == "ResNeXt" else 64
