"""The stages of any network, for learning rates that fall from the heads to the stem."""

from __future__ import annotations

from torch import nn


def stages(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """All parameters of a network in their order, from the stem to the last stage.

    Stages are the parts, themselves made of layers, of the innermost module that holds all sequences of blocks: layer1
    to layer4 of a ResNet, the blocks of a transformer. What comes before the first is the stem; layers between
    or after stages belong to the one before.

    >>> from mls.models import load_backbone
    >>> [sum(p.numel() for p in stage) for stage in stages(load_backbone("resnet_tiny"))]
    [928, 18560, 57728, 230144]
    """
    trunk = backbone
    while len(inner := [child for child in trunk.children() if _has_blocks(child)]) == 1:
        trunk = inner[0]
    parts = [child for child in trunk.children() if _has_layers(child)]
    stage_of = {parameter: stage for stage, part in enumerate(parts, start=1) for parameter in part.parameters()}
    found: list[list[nn.Parameter]] = [[] for _ in range(len(parts) + 1)]
    current = 0
    for parameter in backbone.parameters():
        current = stage_of.get(parameter, current)
        found[current].append(parameter)
    return [stage for stage in found if stage]


def _has_blocks(module: nn.Module) -> bool:
    """Whether a sequence of modules that have layers is somewhere in it."""
    kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    sequences = [part for part in module.modules() if isinstance(part, kinds)]
    return any(sum(_has_layers(child) for child in sequence.children()) > 1 for sequence in sequences)


def _has_layers(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
