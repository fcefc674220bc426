"""The stages of any network, for learning rates that fall from the heads to the stem."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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


def tokens(network: nn.Module) -> set[int]:
    """By `id` the parameters that networks of timm say to be no weights: positions, class tokens, registers."""
    those = [
        (part, cast(Any, part).no_weight_decay()) for part in network.modules() if hasattr(part, "no_weight_decay")
    ]
    return {id(parameter) for part, names in those for name, parameter in part.named_parameters() if name in names}


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a network, from the first to the last: the modules, themselves made of layers, of its innermost
    sequences; where it has none its parts layer1, layer2, and so on.

    >>> from mls.models import load_backbone
    >>> [len(blocks(load_backbone(name))) for name in ("resnet_tiny", "resnet50")]
    [3, 16]
    """
    found = [
        child
        for sequence in backbone.modules()
        if isinstance(sequence, SEQUENCES)
        for child in sequence.children()
        if _has_layers(child) and not isinstance(child, SEQUENCES) and not _holds_blocks(child)
    ]
    return found or [part for name, part in backbone.named_children() if name.startswith("layer")]


def _holds_blocks(module: nn.Module) -> bool:
    sequences = [part for part in module.modules() if isinstance(part, SEQUENCES)]
    return any(_has_layers(child) for sequence in sequences for child in sequence.children())


def _has_blocks(module: nn.Module) -> bool:
    """Whether a sequence of modules that have layers is somewhere in it."""
    sequences = [part for part in module.modules() if isinstance(part, SEQUENCES)]
    return any(sum(_has_layers(child) for child in sequence.children()) > 1 for sequence in sequences)


def _has_layers(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
