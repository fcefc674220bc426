"""mmsegmentation: `backbone.pth`, which has torchvision's names there too, and a configuration that sets the backbone
and the normalisation of any of mmsegmentation's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mls.errors import ConfigError
from mls.exporting.certify import Loaded, blank
from mls.exporting.restated import BLOCKS, RestatedResNet
from mls.exporting.source import Images, Pixels, Source, Stages, in_colours, normalised, save_tensors, stages_of
from mls.exporting.to_torchvision import FILE
from mls.frameworks import installed as frameworks
from mls.frameworks import mmseg_network
from mls.frameworks.config_files import read_python
from mls.frameworks.resnet_plan import NoCounterpart, ResNetPlan
from mls.models import foreign
from mls.models.resnet_names import to_detectron2

RECIPE = "mmseg_config.py"
# What mls' own network has an answer to; strides and dilations are set for the comparison, whatever a recipe says.
KNOWN = {"type", "depth", "style", "groups", "base_width", "init_cfg", "strides", "dilations", "contract_dilation"}
KNOWN |= {"out_indices", "frozen_stages", "norm_eval", "with_cp"}
PLAIN = {"num_stages": (4,), "in_channels": (3,), "deep_stem": (False,), "avg_down": (False,), "pretrained": (None,)}
PLAIN |= {"stem_channels": (64,), "base_channels": (64,), "multi_grid": (None,), "dcn": (None,), "plugins": (None,)}
PLAIN |= {"norm_cfg": [{"type": kind, **more} for kind in ("BN", "SyncBN") for more in ({}, {"requires_grad": True})]}
CONFIG = """# mmsegmentation: {architecture} of {path}, all layers trained.
# `_base_` is any configuration of mmsegmentation with a ResNet of this depth: edit this line to change head or data.
_base_ = '{base}'
# Without mmcv's compiled operators (mmcv-lite) mls brings a stand-in, with all that FCN, PSPNet and PSANet need.
# And it reads checkpoints safely: with torch's default mmengine cannot resume its own.
custom_imports = dict(
    imports=['mls.frameworks.mmcv_lite', 'mls.frameworks.mmengine_checkpoints'], allow_failed_imports=True
)
data_preprocessor = dict(  # mmcv reads images as BGR, the backbone was trained on RGB
{preprocessor})
model = dict(
    pretrained=None,  # else the base's own weights would be loaded as well
    data_preprocessor=data_preprocessor,
    backbone=dict(  # not ResNetV1c, whose stem differs; style pytorch: the stride is in the 3x3 convolution
{network}        init_cfg=dict(type='Pretrained', checkpoint='{{{{ fileDirname }}}}/backbone.pth'),
    ),
)
"""


def write(source: Source, folder: Path, final: Path) -> list[str]:
    plan = source.plan_for("mmseg")
    if plan.name.startswith("wide_"):
        raise NoCounterpart(f"mmseg has no network with the layers of {plan.name}: leave mmseg out of --to")
    save_tensors(source.backbone.state_dict(), folder / FILE)
    text = CONFIG.format(
        architecture=source.architecture,
        path=source.path,
        base=_base(plan),
        preprocessor=_keywords(4, mmseg_network.preprocessor(source.mean, source.std)),
        network=_keywords(8, mmseg_network.network(plan)),
    )
    (folder / RECIPE).write_text(text)
    return [RECIPE]


def _keywords(indent: int, values: dict[str, Any]) -> str:
    return "".join(f"{' ' * indent}{key}={value!r},\n" for key, value in values.items())


def _base(plan: ResNetPlan) -> str:
    """mmsegmentation's FCN for Cityscapes with heads of the right width: where it is installed, its file."""
    depth = {True: min(plan.depth, 101), False: 18}[plan.bottleneck]
    name = f"fcn/fcn_r{depth}-d8_4xb2-{80 if depth == 18 else 40}k_cityscapes-769x769.py"
    if frameworks.missing("mmseg"):
        return f"mmseg::{name}"
    return str(Path(frameworks.load("mmseg").__file__ or "").parent / ".mim" / "configs" / name)


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    """Settings are those of this file alone; what it does not set is mmsegmentation's default, as without a base."""
    settings = read_python(recipe) if recipe else {}
    tensors = foreign.read(file)  # refuses files that would run code, before anything else opens them
    model = settings.get("model", {})
    depth = source.plan_for("mmseg").depth
    backbone = {"type": "ResNet", "depth": depth, "style": "pytorch", **model.get("backbone", {})}
    colours = {"type": "SegDataPreProcessor", **model.get("data_preprocessor", settings.get("data_preprocessor", {}))}
    if frameworks.missing("mmseg"):
        return _restated(file, recipe, backbone, colours, tensors)
    return _real(file, recipe, backbone, colours)


def _real(file: Path, recipe: Path | None, backbone: dict[str, Any], colours: dict[str, Any]) -> Loaded:
    frameworks.load("mmseg")
    from mmengine.registry import DefaultScope

    with frameworks.quiet(), DefaultScope.overwrite_default_scope("mmseg"):  # a program may have set another one
        from mmseg.registry import MODELS

        init = mmseg_network.pretrained(str(file), backbone.get("init_cfg", {}).get("prefix"))
        network = MODELS.build({**backbone, **mmseg_network.STRIDES[32], "init_cfg": init})  # heads dilate it
        blank(network)
        network.init_weights()
        network.eval()
        preprocessor = MODELS.build(colours)

    def stages(pixels: Pixels) -> Stages:
        with torch.no_grad():
            images = preprocessor({"inputs": list(in_colours(pixels, rgb=False))})["inputs"]  # mmcv reads BGR
        return stages_of(network, torch.stack(list(images)))

    return Loaded(file, recipe, f"mmsegmentation {frameworks.version('mmseg')}", network.state_dict(), stages)


def _restated(
    file: Path, recipe: Path | None, backbone: dict[str, Any], colours: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Loaded:
    if backbone["type"] not in ("ResNet", "ResNeXt") or backbone["depth"] not in BLOCKS:
        raise ConfigError(
            f"{recipe} builds {backbone['type']}, which is no plain ResNet: set type='ResNet' in backbone"
        )
    odd = [key for key, value in backbone.items() if key not in KNOWN and value not in PLAIN.get(key, ())]
    if odd:
        how = " and ".join(frameworks.FRAMEWORKS["mmseg"].commands)
        raise ConfigError(
            f"{recipe} sets {', '.join(odd)} of the backbone, to be checked by mmsegmentation alone: {how}"
        )
    plan = ResNetPlan("of the recipe", backbone["depth"], backbone.get("groups", 1), _width(backbone))
    network = RestatedResNet(plan, stride_in_1x1=backbone["style"] == "caffe")
    prefix = backbone.get("init_cfg", {}).get("prefix") or ""
    renamed = {to_detectron2(name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}

    def prepare(pixels: Pixels) -> Images:
        mean, std = colours.get("mean") or [0.0] * 3, colours.get("std") or [1.0] * 3
        return normalised(in_colours(pixels, bool(colours.get("bgr_to_rgb"))), mean, std)

    return network.load("mmsegmentation", file, recipe, renamed, prepare)


def _width(backbone: dict[str, Any]) -> int:
    return backbone.get("base_width", 4) if backbone["type"] == "ResNeXt" else 64
