"""The weights that a cell is measured on. Those of a file are read once: a run may go on training meanwhile, and what
was hashed is what is evaluated. Random weights are called random, however they were named."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from mls.errors import CheckpointError, ConfigError, unknown_name
from mls.files import write_atomically
from mls.models import PREFIXES, backbones, weights_file
from mls.recipes import find_recipe

WRITING = 5.0  # seconds that a run may take between writing its tensors and its card


@dataclass(frozen=True)
class Weights:
    name: str  # as tables show it
    hash: str  # of the file that was read, else of the name
    load_name: str  # for `mls.load_backbone`, or "random": the protocol's backbone
    file: Path | None = None
    tensors: bytes = b""  # the file
    card: bytes = b""  # the .json beside it

    @property
    def facts(self) -> dict[str, Any]:
        try:
            found = json.loads(self.card or b"{}")
        except json.JSONDecodeError:
            raise CheckpointError(f"{self.file} has a card beside it that cannot be read: remove the .json") from None
        return found if isinstance(found, dict) else {}

    def placed(self, folder: Path) -> str:
        """The weights as tasks take them: a copy of what was read, so that nothing changes while they are evaluated."""
        if self.file is None:
            return self.load_name
        copy = folder / "weights" / self.file.name
        if self.tensors:  # of several processes the first one read them
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(copy, self.tensors)
            if self.card:
                write_atomically(copy.with_suffix(".json"), self.card)
            config = self.file.parent / "config.yaml"
            if config.is_file():  # names the plug-ins that a backbone may need
                write_atomically(copy.parent / "config.yaml", config.read_bytes())
        return str(copy)


def read(weights: str, backbone: str) -> Weights:
    """`backbone`: what "random" builds."""
    check_name(weights)
    file = None if is_name(weights) else weights_file(weights)
    if file is None:
        name = public_name(weights, backbone)
        return Weights(name, hashlib.sha256(name.encode()).hexdigest()[:16], weights)
    deadline = time.monotonic() + WRITING
    while True:
        before = _written(file)
        found = _read(weights, file, before)
        # A run writes its tensors first: a card that is older than they are is about to be replaced.
        whole = before == _written(file) and (before[0] <= before[1] or not found.card)
        if whole or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@lru_cache(maxsize=1)  # the cells of a suite share it
def _read(weights: str, file: Path, written: tuple[int, int]) -> Weights:
    tensors, beside = file.read_bytes(), file.with_suffix(".json")
    card = beside.read_bytes() if beside.is_file() else b""
    return Weights(weights, hashlib.sha256(tensors).hexdigest()[:16], weights, file, tensors, card)


def _written(file: Path) -> tuple[int, int]:
    """When the tensors and their card were written."""
    beside = file.with_suffix(".json")
    return file.stat().st_mtime_ns, beside.stat().st_mtime_ns if beside.is_file() else 0


def is_name(weights: str) -> bool:
    """Whether it names a network, not a file or a run. A file of that name comes first."""
    known = ":" in weights or weights in ("random", *backbones.names())
    return known and not Path(weights).expanduser().exists()


def public_name(weights: str, backbone: str) -> str:
    """
    >>> public_name("random", "scratch:resnet50"), public_name("resnet_tiny", ""), public_name("scratch:vgg11", "")
    ('random:resnet50', 'random:resnet_tiny', 'random:vgg11')
    >>> public_name("torchvision:resnet50", "")
    'torchvision:resnet50'
    """
    weights = backbone if weights == "random" else weights
    network = weights.removeprefix("random:").removeprefix("scratch:")
    random = network != weights or network in backbones.names()
    return f"random:{network}" if random else weights


def check_name(weights: str) -> None:
    """Before anything is read: weights that cannot exist."""
    if weights.startswith("pretrain:"):
        find_recipe(weights.removeprefix("pretrain:").partition(" ")[0])
        return
    if not is_name(weights):
        if weights_file(weights) is None:
            near = get_close_matches(weights, ["random", *backbones.names()], n=1)
            hint = f"did you mean {near[0]}? Otherwise " if near else ""
            raise CheckpointError(
                f"{weights} is neither a run folder nor a file: {hint}give --weights the folder that a run printed, "
                "or a name such as torchvision:resnet50"
            )
        return
    prefix, separator, rest = weights.partition(":")
    if separator and prefix not in PREFIXES:
        raise unknown_name(f"kind of weights in {weights}", prefix, PREFIXES, ConfigError)
    if prefix in ("torchvision", "scratch"):
        from torchvision import models

        network, known = rest.partition("@")[0], models.list_models(module=models)
        if network not in known:
            raise unknown_name("torchvision network", network, get_close_matches(network, known, n=8) or known)
