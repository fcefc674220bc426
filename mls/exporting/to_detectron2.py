"""detectron2: `backbone.pkl` under its names, one recipe for FPN and one for C4, and a training script. Its defaults
are those of the networks that Caffe2 trained (BGR, the stride in the first 1x1 convolution): weights without the recipe
give other features, without a warning."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mls.errors import ConfigError
from mls.exporting.certify import Loaded, blank
from mls.exporting.restated import BLOCKS, RestatedResNet
from mls.exporting.source import STAGES, Images, Pixels, Source, Stages, in_colours, normalised, outputs
from mls.frameworks import detectron2_train
from mls.frameworks import installed as frameworks
from mls.frameworks.config_files import merged, read_yaml
from mls.frameworks.resnet_plan import ResNetPlan
from mls.models import foreign
from mls.models.resnet_names import from_detectron2, to_detectron2

FILE = "backbone.pkl"
FPN, C4 = "detectron2_fpn.yaml", "detectron2_c4.yaml"
# detectron2's defaults, as far as features depend on them.
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
    plan = source.plan_for("detectron2")
    tensors = {to_detectron2(name): tensor.numpy() for name, tensor in source.tensors().items()}
    with open(folder / FILE, "wb") as file:
        _Pickler(file, protocol=4).dump({"model": tensors, "__author__": "mls", "matching_heuristics": True})
    recipes = [FPN, C4] if plan.bottleneck else [FPN]  # detectron2's C4 head is made of bottleneck blocks
    for name in recipes:
        (folder / name).write_text(recipe_text(name, source, final / FILE))
    shutil.copyfile(detectron2_train.__file__, folder / "detectron2_train.py")
    return recipes


class _Pickler(pickle.Pickler):
    """Arrays that every numpy can read: numpy 2 writes the name of a module that numpy before 1.26 does not have, and
    detectron2 often runs with an old one."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def recipe_text(name: str, source: Source, weights: Path) -> str:
    """The template in configs/export/ with its values filled in; its comments stay."""
    values = {"WEIGHTS": str(weights.absolute()), "PIXEL_MEAN": source.mean, "PIXEL_STD": source.std}
    if (plan := source.plan) is not None:
        values |= {"DEPTH": plan.depth, "NUM_GROUPS": plan.groups, "WIDTH_PER_GROUP": plan.width}
        values |= {"RES2_OUT_CHANNELS": plan.dim // 8}
    text = (files("mls.configs") / "export" / name).read_text()
    for key, value in values.items():
        plain = json.dumps(value)  # valid YAML, too
        text = re.sub(
            rf"^( *{key}:) [^#\n]*?( +#.*)?$", lambda old, v=plain: f"{old[1]} {v}{old[2] or ''}", text, flags=re.M
        )
    return text


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    """Without a recipe: with detectron2's defaults."""
    config = read_yaml(recipe) if recipe else {}
    tensors = foreign.read(file)  # refuses files that would run code, before anything else opens them
    settings = merged(DEFAULTS, config)
    _refuse_bare_c4(recipe, settings)
    if frameworks.missing("detectron2"):
        return _restated(file, recipe, settings, tensors)
    return _real(file, recipe, config)


def _refuse_bare_c4(recipe: Path | None, settings: dict[str, Any]) -> None:
    """The comparison of features cannot find this mistake: the missing layer comes after them."""
    model = settings["MODEL"]
    c4 = model["BACKBONE"]["NAME"] == "build_resnet_backbone"
    trained = model["RESNETS"]["NORM"] != "FrozenBN"
    if recipe and c4 and trained and model["ROI_HEADS"]["NAME"] == "Res5ROIHeads":
        raise ConfigError(
            f"{recipe} trains C4 without a normalisation after res5, on which these backbones depend: set "
            "MODEL.ROI_HEADS.NAME to Res5ROIHeadsExtraNorm (detectron2_train.py of an export defines it)"
        )


def _restated(file: Path, recipe: Path | None, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Loaded:
    model, rgb = settings["MODEL"], settings["INPUT"]["FORMAT"] == "RGB"
    resnet = model["RESNETS"]
    if resnet["DEPTH"] not in BLOCKS or resnet["RES5_DILATION"] != 1:
        raise ConfigError(f"{recipe} asks for a ResNet without counterpart here: set DEPTH {list(BLOCKS)}, no dilation")
    plan = ResNetPlan("of the recipe", resnet["DEPTH"], resnet["NUM_GROUPS"], resnet["WIDTH_PER_GROUP"])
    has_statistics = resnet["NORM"] in ("BN", "SyncBN", "naiveSyncBN", "FrozenBN")
    network = RestatedResNet(plan, resnet["STRIDE_IN_1X1"], has_statistics)

    def prepare(pixels: Pixels) -> Images:
        return normalised(in_colours(pixels, rgb), model["PIXEL_MEAN"], model["PIXEL_STD"])

    return network.load("detectron2", file, recipe, tensors, prepare)


def _real(file: Path, recipe: Path | None, config: dict[str, Any]) -> Loaded:
    frameworks.load("detectron2")
    with frameworks.quiet():
        from detectron2.checkpoint import DetectionCheckpointer  # pyright: ignore
        from detectron2.config import CfgNode  # pyright: ignore
        from detectron2.modeling import build_model  # pyright: ignore

        cfg = detectron2_train.new_config()
        cfg.merge_from_other_cfg(CfgNode(config))
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg).eval()
        backbone = getattr(model.backbone, "bottom_up", model.backbone)
        parts = {"": backbone}
        if not hasattr(backbone, "res5"):  # C4: the last stage is in the head
            parts["res5."] = nn.Sequential(*list(model.roi_heads.res5)[: BLOCKS[cfg.MODEL.RESNETS.DEPTH][-1]])
        for part in parts.values():
            blank(part)
        DetectionCheckpointer(model).load(str(file))
    states = [(prefix + name, tensor) for prefix, part in parts.items() for name, tensor in part.state_dict().items()]
    own = {from_detectron2(name): tensor for name, tensor in states}

    def stages(pixels: Pixels) -> Stages:
        colours = in_colours(pixels, cfg.INPUT.FORMAT == "RGB")
        with torch.no_grad():
            images = model.preprocess_image([{"image": image} for image in colours]).tensor
        return _stages(backbone, parts.get("res5."), images)

    return Loaded(file, recipe, f"detectron2 {frameworks.version('detectron2')}", own, stages)


def _stages(backbone: nn.Module, res5: nn.Module | None, images: Tensor) -> Stages:
    modules = {
        name: backbone.get_submodule(f"res{n}") for n, name in enumerate(STAGES, 2) if hasattr(backbone, f"res{n}")
    }
    found = outputs(modules, lambda: backbone(images))
    if res5 is not None:
        with torch.no_grad():
            found["layer4"] = res5(found["layer3"])
    return found
