"""The weights that a cell is measured on. Those of a file are read once: a run may go on training meanwhile, and what
was hashed is what is evaluated. Random weights are called random, however they were named."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from mls import card
from mls.errors import CheckpointError, ConfigError
from mls.files import write_atomically
from mls.models import backbones, check_name, extracted, published_name, untrained, weights_file
from mls.recipes import find_recipe


@dataclass(frozen=True)
class Weights:
    name: str  # as tables show it
    hash: str  # of the file that was read, else of the name
    load_name: str  # for `mls.load_backbone`, or "random": the protocol's backbone
    file: Path | None = None
    tensors: bytes = b""  # the file, where they were asked for
    facts: dict[str, Any] = field(default_factory=dict)  # its card

    def placed(self, folder: Path) -> str:
        """The weights as tasks take them: a copy of what was read, so that nothing changes while they are evaluated."""
        if self.file is None:
            return self.load_name
        copy = folder / "weights" / self.file.name
        if self.tensors:  # of several processes the first one read them
            copy.parent.mkdir(parents=True, exist_ok=True)
            card.write(copy, self.tensors, self.facts)
            config = self.file.parent / "config.yaml"
            if config.is_file():  # names the plug-ins that a backbone may need
                write_atomically(copy.parent / "config.yaml", config.read_bytes())
        return str(copy)


def read(
    weights: str, backbone: str, architecture: str | None = None, prefix: str | None = None, tensors: bool = True
) -> Weights:
    """`backbone`: what "random" builds. `architecture` and `prefix`: of a file in which they cannot be found."""
    check_weights(weights)
    file = None if is_name(weights) else weights_file(weights)
    if file is None:
        if architecture or prefix:
            raise ConfigError(f"{weights} says itself which network it is: leave out --architecture and --prefix")
        check_name(untrained(backbone) if weights == "random" else weights)
        name = public_name(weights, backbone)
        return Weights(name, hashlib.sha256(name.encode()).hexdigest()[:16], weights)
    return (_read if tensors else _identity)(weights, file, _written(file), architecture, prefix)


@cache  # a finished suite asks for each column which weights its rows are
def _identity(
    weights: str, file: Path, written: tuple[int, ...], architecture: str | None, prefix: str | None
) -> Weights:
    return replace(_read(weights, file, written, architecture, prefix), tensors=b"")


@lru_cache(maxsize=1)  # the cells of a suite share it
def _read(weights: str, file: Path, written: tuple[int, ...], architecture: str | None, prefix: str | None) -> Weights:
    tensors, facts = (None if architecture or prefix else card.read(file)) or (file.read_bytes(), None)
    digest = hashlib.sha256(tensors)
    if architecture or prefix:
        digest.update(f"{architecture}/{prefix}".encode())
    if facts is None:  # of somebody else: one network of those that the file may hold
        tensors, facts = extracted(file, tensors, architecture, prefix)
        file = file.with_suffix(".safetensors")
    found = Weights(weights, digest.hexdigest()[:16], weights, file, tensors, facts)
    origin = str(found.facts.get("origin", ""))  # random weights stay random in a file that was exported
    note = prefix or (origin if origin.startswith("random:") else "")
    return replace(found, name=f"{weights} ({note})") if note else found


def _written(file: Path) -> tuple[int, ...]:
    """When the tensors and their card were written, and how much."""
    found = [path.stat() for path in (file, card.path_of(file)) if path.is_file()]
    return tuple(number for one in found for number in (one.st_mtime_ns, one.st_size, one.st_ino))


def is_name(weights: str) -> bool:
    """Whether it names a network, not a file or a run. A file of that name comes first."""
    known = ":" in weights or weights in ("random", *backbones.names())
    return known and not Path(weights).expanduser().exists()


def public_name(weights: str, backbone: str) -> str:
    """
    >>> public_name("random", "scratch:resnet50"), public_name("resnet_tiny", ""), public_name("scratch:vgg11", "")
    ('random:resnet50', 'random:resnet_tiny', 'random:vgg11')
    >>> public_name("torchvision:resnet18", ""), public_name("random", "timm:resnet10t")
    ('torchvision:resnet18@IMAGENET1K_V1', 'random:timm:resnet10t')
    """
    weights = untrained(backbone) if weights == "random" else weights
    network = weights.removeprefix("random:").removeprefix("scratch:")
    random = network != weights or network in backbones.names()
    return f"random:{network}" if random else published_name(weights)


def check_weights(weights: str) -> None:
    """Before anything is read: weights that cannot exist."""
    if weights.startswith("pretrain:"):
        find_recipe(weights.removeprefix("pretrain:").partition(" ")[0])
    elif is_name(weights):
        if weights != "random":
            check_name(weights)
    elif weights_file(weights) is None:
        near = get_close_matches(weights, ["random", *backbones.names()], n=1)
        hint = f"did you mean {near[0]}? Otherwise " if near else ""
        raise CheckpointError(
            f"{weights} is neither a run folder nor a file: {hint}give the folder that a run printed, "
            "or a name such as torchvision:resnet50"
        )
