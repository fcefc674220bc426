"""safetensors: the weights and the card beside them, as a run folder has them; `mls.load_backbone` reads both."""

from __future__ import annotations

import json
from pathlib import Path

from mls.exporting.certify import Loaded
from mls.exporting.source import NoCounterpart, Source
from mls.models import backbones

FILE = "backbone.safetensors"
RECIPE = "backbone.json"


def write(source: Source, folder: Path, final: Path) -> list[str]:
    from safetensors.torch import save_file

    if not source.architecture.startswith("timm:") and source.architecture not in backbones.names():
        raise NoCounterpart(
            f"mls itself does not build {source.architecture} from a file: give timm's network of that kind"
        )
    state = {name: tensor.contiguous() for name, tensor in source.backbone.state_dict().items()}
    save_file(state, folder / FILE)
    facts = {**source.card, "feature_dim": source.backbone.feature_dim}
    (folder / RECIPE).write_text(json.dumps(facts, indent=2) + "\n")
    return [RECIPE]


def load(source: Source, file: Path, recipe: Path | None) -> Loaded:
    """Read as anybody reads a backbone of ours: `load_backbone` fills every tensor or refuses."""
    copy = Source.open(file)
    return Loaded(file, recipe, "mls.load_backbone", copy.backbone.state_dict(), copy.stages)
