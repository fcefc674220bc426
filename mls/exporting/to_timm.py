"""timm: `backbone.pth` under timm's names, which are torchvision's for a ResNet, and a snippet that loads it."""

from __future__ import annotations

from pathlib import Path

import torch

from mls.exporting.certify import Loaded
from mls.exporting.restated import RestatedResNet
from mls.exporting.source import Source
from mls.exporting.to_torchvision import FILE, filled, filled_network, plan_of, prepared, said_by
from mls.frameworks import installed as frameworks
from mls.models import foreign
from mls.models.resnet_names import to_detectron2

RECIPE = "use_timm.py"
SNIPPET = '''"""{title}"""

from pathlib import Path

import timm
import torch

NETWORK = "{network}"
MEAN = {mean}  # of RGB, from 0 to 1
STD = {std}
prepare = timm.data.create_transform((3, {size}, {size}), mean=MEAN, std=STD)


def load(**options) -> torch.nn.Module:
    """The backbone, whose output is the {dim} features; features_only=True gives its stages."""
    network = timm.create_model(NETWORK, pretrained=False, **{{"num_classes": 0, **options}})
    network.load_state_dict(torch.load(Path(__file__).with_name("backbone.pth"), weights_only=True))
    return network.eval()
'''


def _network(source: Source) -> str:
    name = source.architecture
    return name.removeprefix("timm:") if name.startswith("timm:") else plan_of(source, "timm").name


def write(source: Source, folder: Path, final: Path) -> list[str]:
    name = _network(source)
    torch.save(dict(source.backbone.state_dict()), folder / FILE)
    (folder / RECIPE).write_text(filled(SNIPPET, source, name, f"The backbone of {final.parent} in timm."))
    return [RECIPE]


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    said = said_by(recipe)
    if frameworks.missing("timm"):
        network = RestatedResNet(plan_of(source, "timm"))
        held = network.take(foreign.read(file), to_detectron2)
        stages = lambda pixels: network.stages(prepared(pixels, source, said))
        return Loaded(file, recipe, "mls's restatement of timm's ResNet (timm is not installed)", held, stages)
    timm = frameworks.load("timm")
    network = timm.create_model(said.get("NETWORK", _network(source)), pretrained=False, num_classes=0)
    return filled_network(source, file, recipe, network, f"timm {frameworks.version('timm')}", said)
