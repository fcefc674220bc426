"""The backbone in mmsegmentation's words, as exports and `backend: mmseg` both write it."""

from __future__ import annotations

from typing import Any

from mls.frameworks.resnet_plan import ResNetPlan

STRIDES: dict[int, dict[str, Any]] = {  # by the output stride of the whole backbone; 32: as it was pretrained
    4: {"dilations": (1, 2, 4, 8), "strides": (1, 1, 1, 1)},
    8: {"dilations": (1, 1, 2, 4), "strides": (1, 2, 1, 1)},
    16: {"dilations": (1, 1, 1, 2), "strides": (1, 2, 2, 1)},
    32: {"dilations": (1, 1, 1, 1), "strides": (1, 2, 2, 2)},
}


def network(plan: ResNetPlan) -> dict[str, Any]:
    """Type and size of the network. Not ResNetV1c, mmsegmentation's usual one, whose stem has three convolutions. Style
    pytorch: a stage's stride is in its 3x3 convolution.

    >>> network(ResNetPlan.of("resnet18"))
    {'type': 'ResNet', 'depth': 18, 'style': 'pytorch'}
    """
    if plan.groups == 1:
        return {"type": "ResNet", "depth": plan.depth, "style": "pytorch"}
    groups = {"groups": plan.groups, "base_width": plan.width}
    return {"type": "ResNeXt", "depth": plan.depth, **groups, "style": "pytorch"}


def pretrained(checkpoint: str, prefix: str | None = None) -> dict[str, Any]:
    """The `init_cfg` that loads a file into the backbone."""
    return {"type": "Pretrained", "checkpoint": checkpoint} | ({"prefix": prefix} if prefix else {})


def preprocessor(mean: list[float], std: list[float]) -> dict[str, Any]:
    """mmcv reads images as BGR, the backbone was trained on RGB."""
    return {"type": "SegDataPreProcessor", "mean": mean, "std": std, "bgr_to_rgb": True}
