"""torchvision: `backbone.pth` under torchvision's names, and a snippet that loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from mls.errors import ConfigError
from mls.exporting.certify import Loaded, fill
from mls.exporting.source import Images, Pixels, Source, normalised, save_tensors, stages_of
from mls.frameworks.config_files import read_python
from mls.models import foreign

FILE = "backbone.pth"
RECIPE = "use_torchvision.py"
SNIPPET = '''"""{title}"""

from pathlib import Path

import torch
from torchvision import models
from torchvision.transforms import v2

NETWORK = "{network}"
MEAN = {mean}  # of RGB, from 0 to 1
STD = {std}
prepare = v2.Compose(
    [
        v2.Resize({resize}),
        v2.CenterCrop({size}),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


def load() -> torch.nn.Module:
    network = models.get_model(NETWORK, weights=None)
    network.fc = torch.nn.Identity()  # a backbone: its output is the {dim} features
    network.load_state_dict(torch.load(Path(__file__).with_name("backbone.pth"), weights_only=True))
    return network.eval()
'''


def write(source: Source, folder: Path, final: Path) -> list[str]:
    plan = source.plan_for("torchvision")
    save_tensors(source.backbone.state_dict(), folder / FILE)
    (folder / RECIPE).write_text(filled(SNIPPET, source, plan.name, f"The backbone of {final.parent} in torchvision."))
    return [RECIPE]


def filled(snippet: str, source: Source, network: str, title: str, **more: Any) -> str:
    mean, std = tuple(source.card["mean"]), tuple(source.card["std"])
    size, dim = source.card["input_size"], source.backbone.feature_dim
    facts = {"title": title, "network": network, "mean": mean, "std": std, "size": size, "dim": dim}
    return snippet.format(**facts, **more, resize=round(size * 8 / 7))


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    plan = source.plan_for("torchvision")
    settings = read_snippet(recipe, "NETWORK")
    network = torchvision.models.get_model(settings.get("NETWORK", plan.name), weights=None)
    network.fc = nn.Identity()
    return filled_network(source, file, recipe, network, f"torchvision {torchvision.__version__}", settings)


def read_snippet(snippet: Path | None, *wanted: str) -> dict[str, Any]:
    """What a snippet assigns, MEAN and STD and the wanted names among it."""
    if snippet is None:
        return {}
    settings = read_python(snippet)
    absent = [name for name in (*wanted, "MEAN", "STD") if name not in settings]
    if absent:
        raise ConfigError(f"{snippet} does not set {', '.join(absent)}: write plain assignments, as an export does")
    return settings


def filled_network(
    source: Source, file: Path, recipe: Path | None, network: nn.Module, by: str, settings: dict[str, Any]
) -> Loaded:
    fill(network, foreign.read(file))
    stages = lambda pixels: stages_of(network, prepared(pixels, source, settings))
    return Loaded(file, recipe, by, network.state_dict(), stages)


def prepared(pixels: Pixels, source: Source, settings: dict[str, Any]) -> Images:
    """With the snippet's mean and std, or else the source's."""
    mean, std = ([255 * value for value in settings.get(key.upper(), source.card[key])] for key in ("mean", "std"))
    return normalised(pixels, mean, std)
