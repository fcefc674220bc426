"""The backbone that is exported, with its card, and its features at every stage, which each exported copy must give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mls.errors import CheckpointError
from mls.files import sha256
from mls.frameworks.resnet_plan import NoCounterpart, ResNetPlan
from mls.frozen.features import hash_of_weights
from mls.models import backbones, card_of_name, foreign, load_backbone, weights_file
from mls.models.backbones import RESNETS, Backbone

Pixels = UInt8[Tensor, "batch 3 height width"]  # RGB
Images = Float[Tensor, "batch 3 height width"]  # as a network takes them
Stages = dict[str, Float[Tensor, "batch ..."]]  # layer1, layer2, ... and `features`, the pooled output
STAGES = ("layer1", "layer2", "layer3", "layer4")
DISK_FULL = "free some, or choose another --out"


@dataclass(frozen=True)
class Source:
    """The backbone of a run or a file, or one with a name."""

    backbone: Backbone
    path: Path  # or the name
    card: dict[str, Any]
    plan: ResNetPlan | None  # if its layers are those of one of torchvision's ResNets
    prefix: str | None = None  # by which it was asked for in a file of several networks

    @classmethod
    def open(cls, weights: str | Path, architecture: str | None = None, prefix: str | None = None) -> Source:
        path = weights_file(weights)
        if path is None and ":" not in str(weights) and str(weights) not in backbones.names():
            raise CheckpointError(f"{weights} is neither a run folder nor a file: give what is to be exported")
        backbone = load_backbone(weights, architecture, prefix)
        card, path = (backbone.card, path) if path else (card_of_name(str(weights)), Path(weights))
        plan = None
        if card["architecture"].removeprefix("timm:") in RESNETS:
            name = card["architecture"].removeprefix("timm:")
            plan = None if foreign.misfits(backbone.state_dict(), name) else ResNetPlan.of(name)
        return cls(backbone, path, card, plan, prefix)

    def plan_for(self, target: str) -> ResNetPlan:
        """The plan of a network that `target` can build."""
        if self.plan is None:
            others = "safetensors or timm" if self.architecture.startswith("timm:") else "safetensors"
            raise NoCounterpart(
                f"{target} has no network with the layers of {self.architecture}: export to {others}, or train a "
                "ResNet such as resnet50"
            )
        return self.plan

    @property
    def architecture(self) -> str:
        return self.card["architecture"]

    @property
    def mean(self) -> list[float]:
        """Of pixels from 0 to 255."""
        return [round(255 * value, 3) for value in self.card["mean"]]

    @property
    def std(self) -> list[float]:
        return [round(255 * value, 3) for value in self.card["std"]]

    def facts(self) -> dict[str, Any]:
        # Of the bytes that were read: a run that goes on training may have replaced them.
        digest = self.card.get("sha256")
        of_file = self.path.is_file()
        digest = digest or (sha256(self.path) if of_file else hash_of_weights(self.backbone))
        wanted = {"path": str(self.path.absolute() if of_file else self.path), "sha256": digest}
        wanted |= {"architecture": self.architecture, "prefix": self.prefix}
        return {**wanted, "mean": self.card["mean"], "std": self.card["std"], "origin": self.card.get("origin", "mls")}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the features depend on."""
        return {name: t.detach() for name, t in self.backbone.state_dict().items() if t.is_floating_point()}

    def pixels(self) -> Pixels:
        """Random images, neither square nor grey: features differ if sides or colours are swapped."""
        size = (96, 128) if self.plan else (self.card["input_size"],) * 2
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)

    @functools.cached_property
    def reference(self) -> tuple[Pixels, Stages]:
        """What every copy is compared with: images, and the backbone's features of them."""
        pixels = self.pixels()
        return pixels, self.stages(pixels)

    def stages(self, pixels: Pixels) -> Stages:
        images = normalised(pixels, [255 * m for m in self.card["mean"]], [255 * s for s in self.card["std"]])
        return stages_of(self.backbone, images)


def save_tensors(tensors: Mapping[str, Any], file: Path) -> None:
    """Through a file of Python's: of a full disk torch's own says nothing."""
    with open(file, "wb") as opened:
        torch.save(dict(tensors), opened)


def in_colours(pixels: Pixels, rgb: bool) -> Pixels:
    """As RGB, or as BGR."""
    return pixels if rgb else pixels.flip(1)


def normalised(pixels: Pixels, mean: Sequence[float | int], std: Sequence[float | int]) -> Images:
    shape = (1, 3, 1, 1)
    return (pixels.float() - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def stages_of(backbone: nn.Module, images: Images) -> Stages:
    """The outputs of a network's stages, if they have torchvision's names, and of the network."""
    modules = {name: module for name, module in backbone.named_children() if name in STAGES}
    return outputs({**modules, "features": backbone}, lambda: backbone(images))


def outputs(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> Stages:
    """The outputs of these modules during `run()`, as far as they are tensors."""
    found: Stages = {}

    def store(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            found[name] = output.clone()

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: store(name, output))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found
