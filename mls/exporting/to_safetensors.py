"""safetensors: the weights and the card beside them, as a run folder has them; `mls.load_backbone` reads both."""

from __future__ import annotations

from pathlib import Path

from mls import card
from mls.exporting.certify import Loaded
from mls.exporting.source import DISK_FULL, NoCounterpart, Source
from mls.models import backbones

FILE = "backbone.safetensors"
RECIPE = "backbone.json"


def write(source: Source, folder: Path, final: Path) -> list[str]:
    if not source.architecture.startswith("timm:") and source.architecture not in backbones.names():
        raise NoCounterpart(
            f"mls itself does not build {source.architecture} from a file: give timm's network of that kind"
        )
    save_with_card(source, folder / FILE)
    return [RECIPE]


def save_with_card(source: Source, file: Path) -> None:
    from safetensors.torch import save

    state = {name: tensor.contiguous() for name, tensor in source.backbone.state_dict().items()}
    card.write(file, save(state), {**source.card, "feature_dim": source.backbone.feature_dim}, DISK_FULL)


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    """Read as anybody reads a backbone of ours: `load_backbone` fills every tensor or refuses."""
    copy = Source.open(file)
    return Loaded(file, recipe, "mls.load_backbone", copy.backbone.state_dict(), copy.stages)
