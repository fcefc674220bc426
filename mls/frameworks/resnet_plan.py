"""The ResNets of torchvision, which every framework can build: what makes one differ from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torchvision.models import ResNet

from mls.errors import ConfigError
from mls.models import backbones


class NoCounterpart(ConfigError):
    """A framework has no network with the layers of this backbone."""


@dataclass(frozen=True)
class ResNetPlan:
    name: str
    depth: int
    groups: int
    width: int  # of a group, in the first stage

    @classmethod
    def of(cls, name: str) -> ResNetPlan:
        """
        >>> ResNetPlan.of("resnext50_32x4d")
        ResNetPlan(name='resnext50_32x4d', depth=50, groups=32, width=4)
        """
        with torch.device("meta"):
            network = cast(ResNet, backbones.build(name))
        depth = "".join(filter(str.isdigit, name.removeprefix("wide_").partition("_")[0]))
        return cls(name, int(depth), network.groups, network.base_width)

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    @property
    def dim(self) -> int:
        return 2048 if self.bottleneck else 512
