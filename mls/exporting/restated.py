"""The ResNet of detectron2 and of mmsegmentation in plain torch, under detectron2's names: it loads an export where the
framework itself is not installed. It has only what changes features: no freezing, no FPN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mls.exporting.certify import Loaded, fill
from mls.exporting.source import STAGES, Images, Pixels, Stages, outputs
from mls.frameworks.resnet_plan import ResNetPlan
from mls.models.resnet_names import from_detectron2

Prepare = Callable[[Pixels], Images]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ConvNorm(nn.Conv2d):
    """detectron2 keeps a convolution's normalisation inside it, as `.norm`."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, norm: bool = True
    ) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, input: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d i j"]:
        y = super().forward(input)
        return y if self.norm is None else self.norm(y)


class Block(nn.Module):
    def __init__(self, convolutions: list[ConvNorm], shortcut: ConvNorm | None) -> None:
        super().__init__()
        for number, convolution in enumerate(convolutions, start=1):
            self.add_module(f"conv{number}", convolution)
        self.shortcut = shortcut
        self.depth = len(convolutions)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d i j"]:
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"conv{number}")(y)
            y = torch.relu(y) if number < self.depth else y
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class RestatedResNet(nn.Module):
    """`stride_in_1x1`: a stage's stride is in its first 1x1 convolution (detectron2's default, mmseg's style caffe),
    not in the 3x3 one as torchvision and every self-supervised ResNet have it."""

    def __init__(self, plan: ResNetPlan, stride_in_1x1: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = ConvNorm(3, 64, 7, stride=2, norm=norm)
        self.plan, self.stride_in_1x1, self.norm = plan, stride_in_1x1, norm
        inputs = 64
        for stage, count in enumerate(BLOCKS[plan.depth]):
            width = 2**stage * 64
            outputs = 4 * width if plan.bottleneck else width
            blocks = [
                self._block(inputs if i == 0 else outputs, 2**stage, outputs, 2 if stage and i == 0 else 1)
                for i in range(count)
            ]
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))
            inputs = outputs

    def _block(self, inputs: int, factor: int, outputs: int, stride: int) -> Block:
        norm, plan = self.norm, self.plan
        changes = inputs != outputs or stride > 1
        shortcut = ConvNorm(inputs, outputs, 1, stride, norm=norm) if changes else None
        if not plan.bottleneck:
            first = ConvNorm(inputs, outputs, 3, stride, norm=norm)
            return Block([first, ConvNorm(outputs, outputs, 3, norm=norm)], shortcut)
        width = plan.groups * plan.width * factor
        in_1x1, in_3x3 = (stride, 1) if self.stride_in_1x1 else (1, stride)
        first = ConvNorm(inputs, width, 1, in_1x1, norm=norm)
        second = ConvNorm(width, width, 3, in_3x3, plan.groups, norm=norm)
        return Block([first, second, ConvNorm(width, outputs, 1, norm=norm)], shortcut)

    def forward(self, images: Images) -> Float[Tensor, "batch dim h w"]:
        x = F.max_pool2d(torch.relu(cast(nn.Module, self.stem.conv1)(images)), 3, stride=2, padding=1)
        for number in (2, 3, 4, 5):
            x = self.get_submodule(f"res{number}")(x)
        return x

    def stages(self, images: Images) -> Stages:
        modules = {name: self.get_submodule(f"res{number}") for number, name in enumerate(STAGES, start=2)}
        return outputs(modules, lambda: self(images))

    def load(
        self, framework: str, file: Path, recipe: Path | None, tensors: Mapping[str, Tensor], prepare: Prepare
    ) -> Loaded:
        """Fill it with a file's tensors, which have detectron2's names. `prepare`: the recipe's normalisation."""
        fill(self, tensors)
        own = {from_detectron2(name): tensor for name, tensor in self.state_dict().items()}
        by = f"mls's restatement of {framework}'s ResNet ({framework} is not installed)"
        return Loaded(file, recipe, by, own, lambda pixels: self.stages(prepare(pixels)))
