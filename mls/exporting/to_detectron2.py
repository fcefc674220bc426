"""detectron2: `backbone.pkl` under its names, one recipe for FPN and one for C4, and a training script. Its defaults
are those of the networks that Caffe2 trained (BGR, the stride in the first 1x1 convolution), so weights without the
recipe give other features, and nothing says so."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mls.errors import ConfigError
from mls.exporting import settings
from mls.exporting.certify import Loaded, blank
from mls.exporting.restated import BLOCKS, RestatedResNet
from mls.exporting.source import STAGES, Pixels, ResNetPlan, Source, Stages, normalised, outputs
from mls.exporting.to_torchvision import plan_of
from mls.frameworks import detectron2_train
from mls.frameworks import installed as frameworks
from mls.models import foreign
from mls.models.resnet_names import from_detectron2, to_detectron2

FILE = "backbone.pkl"
FPN, C4 = "detectron2_fpn.yaml", "detectron2_c4.yaml"
# What a recipe does not say is detectron2's default; the parts that features depend on:
DEFAULTS = {
    "INPUT": {"FORMAT": "BGR"},
    "MODEL": {
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {"NAME": "build_resnet_backbone"},
        "RESNETS": {
            "DEPTH": 50,
            "NUM_GROUPS": 1,
            "WIDTH_PER_GROUP": 64,
            "STRIDE_IN_1X1": True,
            "NORM": "FrozenBN",
            "RES5_DILATION": 1,
        },
        "ROI_HEADS": {"NAME": "Res5ROIHeads"},
    },
}


def write(source: Source, folder: Path, final: Path) -> list[str]:
    plan = plan_of(source, "detectron2")
    tensors = {to_detectron2(name): tensor.numpy() for name, tensor in source.tensors().items()}
    with open(folder / FILE, "wb") as file:
        _Pickler(file, protocol=4).dump({"model": tensors, "__author__": "mls", "matching_heuristics": True})
    recipes = [FPN, C4] if plan.bottleneck else [FPN]  # detectron2's C4 head is made of bottleneck blocks
    for name in recipes:
        (folder / name).write_text(recipe_text(name, source, plan, final / FILE))
    shutil.copyfile(detectron2_train.__file__, folder / "detectron2_train.py")
    return recipes


class _Pickler(pickle.Pickler):
    """Arrays as any numpy reads them: numpy 2 writes the name of a module that numpy before 1.26 has not, and
    detectron2 often runs beside an old one."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def recipe_text(name: str, source: Source, plan: ResNetPlan, weights: Path) -> str:
    """The template in configs/export/, whose comments stay."""
    filled = {
        "WEIGHTS": str(weights.absolute()),
        "PIXEL_MEAN": source.mean,
        "PIXEL_STD": source.std,
        "DEPTH": plan.depth,
        "NUM_GROUPS": plan.groups,
        "WIDTH_PER_GROUP": plan.width,
        "RES2_OUT_CHANNELS": plan.dim // 8,
    }
    text = (files("mls.configs") / "export" / name).read_text()
    for key, value in filled.items():
        plain = json.dumps(value)  # is YAML too
        text = re.sub(
            rf"^( *{key}:) [^#\n]*?( +#.*)?$", lambda old, v=plain: f"{old[1]} {v}{old[2] or ''}", text, flags=re.M
        )
    return text


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    """Without a recipe: what detectron2's defaults make of the file."""
    said = settings.read_yaml(recipe) if recipe else {}
    tensors = foreign.read(file)  # refuses what would run code, before anything else opens it
    known = settings.merged(DEFAULTS, said)
    _refuse_bare_c4(recipe, known)
    if frameworks.missing("detectron2"):
        return _restated(file, recipe, known, tensors)
    return _real(file, recipe, said)


def _refuse_bare_c4(recipe: Path | None, known: dict[str, Any]) -> None:
    """Features cannot show this one: the missing layer comes after them."""
    model = known["MODEL"]
    c4 = model["BACKBONE"]["NAME"] == "build_resnet_backbone"
    trained = model["RESNETS"]["NORM"] != "FrozenBN"
    if recipe and c4 and trained and model["ROI_HEADS"]["NAME"] == "Res5ROIHeads":
        raise ConfigError(
            f"{recipe} trains C4 without a normalisation after res5, on which these backbones depend: set "
            "MODEL.ROI_HEADS.NAME to Res5ROIHeadsExtraNorm (detectron2_train.py of an export defines it)"
        )


def _restated(file: Path, recipe: Path | None, known: dict[str, Any], tensors: Mapping[str, Tensor]) -> Loaded:
    model, image_format = known["MODEL"], known["INPUT"]["FORMAT"]
    resnet = model["RESNETS"]
    if resnet["DEPTH"] not in BLOCKS or resnet["RES5_DILATION"] != 1:
        raise ConfigError(f"{recipe} asks for a ResNet without counterpart here: set DEPTH {list(BLOCKS)}, no dilation")
    plan = ResNetPlan("of the recipe", resnet["DEPTH"], resnet["NUM_GROUPS"], resnet["WIDTH_PER_GROUP"])
    has_statistics = resnet["NORM"] in ("BN", "SyncBN", "naiveSyncBN", "FrozenBN")
    network = RestatedResNet(plan, resnet["STRIDE_IN_1X1"], has_statistics)
    held = network.take(tensors)

    def stages(pixels: Pixels) -> Stages:
        seen = pixels if image_format == "RGB" else pixels.flip(1)
        return network.stages(normalised(seen, model["PIXEL_MEAN"], model["PIXEL_STD"]))

    return Loaded(file, recipe, "mls's restatement of detectron2's ResNet (detectron2 is not installed)", held, stages)


def _real(file: Path, recipe: Path | None, said: dict[str, Any]) -> Loaded:
    frameworks.load("detectron2")
    with frameworks.quiet():
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import CfgNode, get_cfg
        from detectron2.modeling import build_model

        detectron2_train.register_extra_norm()
        cfg = get_cfg()
        cfg.merge_from_other_cfg(CfgNode(said))
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg).eval()
        backbone = getattr(model.backbone, "bottom_up", model.backbone)
        parts = {"": backbone}
        if not hasattr(backbone, "res5"):  # C4: the last stage is in the head
            parts["res5."] = nn.Sequential(*list(model.roi_heads.res5)[: BLOCKS[cfg.MODEL.RESNETS.DEPTH][-1]])
        for part in parts.values():
            blank(part)
        DetectionCheckpointer(model).load(str(file))
    held = {prefix + name: t for prefix, part in parts.items() for name, t in part.state_dict().items()}

    def stages(pixels: Pixels) -> Stages:
        seen = pixels if cfg.INPUT.FORMAT == "RGB" else pixels.flip(1)
        with torch.no_grad():
            images = model.preprocess_image([{"image": image} for image in seen]).tensor
        return _stages(backbone, parts.get("res5."), images)

    by = f"detectron2 {frameworks.version('detectron2')}"
    return Loaded(file, recipe, by, {from_detectron2(name): tensor for name, tensor in held.items()}, stages)


def _stages(backbone: nn.Module, res5: nn.Module | None, images: Tensor) -> Stages:
    modules = {
        name: backbone.get_submodule(f"res{n}") for n, name in enumerate(STAGES, 2) if hasattr(backbone, f"res{n}")
    }
    seen = outputs(modules, lambda: backbone(images))
    if res5 is not None:
        with torch.no_grad():
            seen["layer4"] = res5(seen["layer3"])
    return seen
