"""The check that an exported backbone equals its source: every tensor is in the target's network, and on random images
every stage gives the same features."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mls
from mls.errors import CheckpointError
from mls.exporting.source import Pixels, Source, Stages
from mls.files import sha256

TOLERANCE = 1e-4  # of the largest value of a stage


@dataclass(frozen=True)
class Loaded:
    """A target's network as a recipe builds it, with the tensors of the file."""

    file: Path
    recipe: Path | None
    by: str  # the framework and its version, or that it is our restatement of it
    tensors: Mapping[str, Tensor]  # of its backbone, under torchvision's names
    stages: Callable[[Pixels], Stages]  # from pixels of an image file to features, with the recipe's normalisation


def blank(network: nn.Module) -> None:
    """NaN in all tensors, so that those which a file does not fill are found afterwards."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors whose names and shapes agree; the rest stays NaN."""
    blank(network)
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    network.load_state_dict(fitting, strict=False)
    network.eval()


def certify(source: Source, loaded: Loaded) -> dict[str, Any]:
    """The facts for the certificate; a CheckpointError if the copy differs."""
    count = _coverage(source, loaded)
    pixels, wanted = source.reference
    got = loaded.stages(pixels)
    differences = {name: _difference(wanted[name], got[name]) for name in wanted if name in got}
    if not differences:
        raise CheckpointError(
            f"{_subject(loaded)} gives none of the stages {', '.join(wanted)}: nothing can be compared"
        )
    wrong = [
        f"{name} by {one['max_abs_difference']:.3g} of {one['largest_value']:.3g}"
        for name, one in differences.items()
        if not one["max_abs_difference"] <= TOLERANCE * one["largest_value"]  # NaN is wrong too
    ]
    if wrong:
        raise CheckpointError(
            f"{_subject(loaded)} gives other features than {source.path}: {', '.join(wrong)}; what differs is the "
            "recipe (the stride's place, the order of colours, mean and std) or the weights"
        )
    return {
        "recipe": loaded.recipe and loaded.recipe.name,
        "recipe_sha256": loaded.recipe and sha256(loaded.recipe),
        "loaded_by": loaded.by,
        "coverage": {"keys": count, "of": count},
        "stages": differences,
    }


def _coverage(source: Source, loaded: Loaded) -> int:
    wanted = source.tensors()
    own = {name: tensor for name, tensor in loaded.tensors.items() if tensor.is_floating_point()}
    lost = [
        name
        for name, tensor in wanted.items()
        if name not in own or own[name].shape != tensor.shape or (own[name].isnan() & ~tensor.isnan()).any()
    ]
    if lost:
        raise CheckpointError(
            f"{len(lost)} of {len(wanted)} tensors of {source.path} did not arrive in {_subject(loaded)}: "
            f"{_some(lost)}; the recipe must build {source.architecture}"
        )
    empty = sorted(set(own) - set(wanted))
    if empty:
        raise CheckpointError(
            f"{_subject(loaded)} has {len(empty)} tensors that {source.path} does not fill: {_some(empty)}; "
            f"the recipe must build {source.architecture}"
        )
    return len(wanted)


def _difference(wanted: Tensor, got: Tensor) -> dict[str, float]:
    if wanted.shape != got.shape:
        return {"max_abs_difference": float("nan"), "largest_value": float(wanted.abs().max())}
    return {"max_abs_difference": float((wanted - got).abs().max()), "largest_value": float(wanted.abs().max())}


def _subject(loaded: Loaded) -> str:
    return f"{loaded.file.name} as {loaded.recipe.name} uses it" if loaded.recipe else loaded.file.name


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def certificate(target: str, source: Source, file: Path, checks: list[dict[str, Any]]) -> str:
    facts = {
        "target": target,
        "file": file.name,
        "sha256": sha256(file),
        "source": source.facts(),
        "input": {"pixels": "uint8 RGB, uniform", "shape": list(source.pixels().shape), "seed": 0},
        "tolerance": TOLERANCE,
        "checks": checks,
        "versions": {"mls": mls.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return json.dumps(facts, indent=2) + "\n"
