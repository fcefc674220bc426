"""timm: `backbone.pth` under timm's names, which are torchvision's for a ResNet, and a snippet that loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mls.errors import ConfigError
from mls.exporting.certify import Loaded
from mls.exporting.restated import RestatedResNet
from mls.exporting.source import Source, save_tensors
from mls.exporting.to_torchvision import FILE, filled, filled_network, prepared, read_snippet
from mls.frameworks import installed as frameworks
from mls.models import foreign
from mls.models.backbones import ANY_SIZE, TINY, TINY_OF
from mls.models.resnet_names import to_detectron2

RECIPE = "use_timm.py"
SNIPPET = '''"""{title}"""

from pathlib import Path

import timm
import torch

NETWORK = "{network}"
OPTIONS = {options}
MEAN = {mean}  # of RGB, from 0 to 1
STD = {std}
prepare = timm.data.create_transform((3, {size}, {size}), mean=MEAN, std=STD)


def load(**options) -> torch.nn.Module:
    """The backbone, whose output is the {dim} features{stages}."""
    network = timm.create_model(NETWORK, pretrained=False, **{{"num_classes": 0, **OPTIONS, **options}})
    network.load_state_dict(torch.load(Path(__file__).with_name("backbone.pth"), weights_only=True))
    return network.eval()
'''


def network_of(source: Source) -> str:
    name = source.architecture
    if name == "vit_tiny":
        return TINY_OF
    return name.removeprefix("timm:") if name.startswith("timm:") else source.plan_for("timm").name


def options_of(source: Source) -> dict[str, Any]:
    """The arguments that timm builds the network with, beside its name."""
    any_size = ANY_SIZE if getattr(source.backbone, "dynamic_img_size", False) else {}
    return {**any_size, **(TINY if source.architecture == "vit_tiny" else {})}


def write(source: Source, folder: Path, final: Path) -> list[str]:
    name = network_of(source)
    save_tensors(source.backbone.state_dict(), folder / FILE)
    title, options = f"The backbone of {final.parent} in timm.", options_of(source)
    stages = "; features_only=True gives its stages" if source.plan else ""  # others have other names there
    (folder / RECIPE).write_text(filled(SNIPPET, source, name, title, options=options, stages=stages))
    return [RECIPE]


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    settings = read_snippet(recipe, "NETWORK")
    if frameworks.missing("timm"):
        if settings.get("NETWORK", network_of(source)) != network_of(source) or settings.get("OPTIONS"):
            how = " and ".join(frameworks.FRAMEWORKS["timm"].commands)
            raise ConfigError(f"{recipe} builds no plain {network_of(source)}, to be checked by timm alone: {how}")
        tensors = {to_detectron2(name): tensor for name, tensor in foreign.read(file).items()}
        prepare = lambda pixels: prepared(pixels, source, settings)
        return RestatedResNet(source.plan_for("timm")).load("timm", file, recipe, tensors, prepare)
    timm = frameworks.load("timm")
    options = settings.get("OPTIONS", {} if recipe else options_of(source))
    if options not in ({}, ANY_SIZE, {**ANY_SIZE, **TINY}):
        raise ConfigError(f"OPTIONS of {recipe} ask for more than a backbone as mls exports it: export again")
    name = settings.get("NETWORK", network_of(source))
    network = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return filled_network(source, file, recipe, network, f"timm {frameworks.version('timm')}", settings)
