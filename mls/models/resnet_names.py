"""One ResNet, three ways to name its tensors: torchvision's, which is ours, detectron2's, and that of an
`nn.Sequential` of torchvision's children, which lightly's examples save."""

import re

DETECTRON2 = (
    *((f"layer{stage}.", f"res{stage + 1}.") for stage in (1, 2, 3, 4)),
    ("downsample.0.", "shortcut."),
    ("downsample.1.", "shortcut.norm."),
    *((f"bn{layer}.", f"conv{layer}.norm.") for layer in (1, 2, 3)),
)
CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def to_detectron2(name: str) -> str:
    """
    >>> to_detectron2("layer1.0.downsample.1.weight"), to_detectron2("bn1.bias")
    ('res2.0.shortcut.norm.weight', 'stem.conv1.norm.bias')
    """
    for ours, theirs in DETECTRON2:
        name = name.replace(ours, theirs)
    return name if name.startswith("res") else f"stem.{name}"


def from_detectron2(name: str) -> str:
    """
    >>> from_detectron2("res2.0.shortcut.norm.weight"), from_detectron2("stem.conv1.norm.bias")
    ('layer1.0.downsample.1.weight', 'bn1.bias')
    """
    name = name.removeprefix("stem.")
    for ours, theirs in reversed(DETECTRON2):
        name = name.replace(theirs, ours)
    return name


def from_sequential(name: str) -> str:
    """
    >>> from_sequential("0.weight"), from_sequential("4.0.conv1.weight")
    ('conv1.weight', 'layer1.0.conv1.weight')
    """
    return re.sub(r"^([0-7])\.", lambda found: f"{CHILDREN[int(found[1])]}.", name)
