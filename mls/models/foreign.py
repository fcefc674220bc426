"""Weights that others wrote, as backbones: checkpoints of MoCo, MoCo-v3, DenseCL, solo-learn, lightly, torchvision and
timm, and detectron2's pickles. Nothing in a file is ever executed. Which backbone a file holds, and behind which
prefix, is found by its names and shapes; what leaves a doubt is an error."""

from __future__ import annotations

import functools
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mls.errors import CheckpointError, ConfigError, refusal
from mls.models import backbones
from mls.models.resnet_names import from_detectron2, from_sequential

INSIDE = ("state_dict", "model", "model_state_dict", "method")  # where programs keep the network (ours the last)
# The slow average of another network in the same file: the network itself is the one that is wanted.
AVERAGE = re.compile(r"momentum|teacher|target|encoder_k|(^|\.)(key|ema)\.", re.IGNORECASE)
NAMES: dict[str, tuple[str, Callable[[str], str]]] = {  # a first convolution's name, and how to rename to ours
    "torchvision": ("conv1.weight", lambda name: name),
    "detectron2": ("stem.conv1.weight", from_detectron2),
    "nn.Sequential": ("0.weight", from_sequential),
}
ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")}
ARRAYS |= {("numpy._core.multiarray", "_reconstruct"), ("numpy._core.numeric", "_frombuffer")}
ARRAYS |= {("builtins", "bytearray")}

ALONE = " (`mls export FILE --prefix … --to safetensors` writes it alone, for commands without the option)"
ARCHITECTURE = "name its architecture with --architecture, such as timm:resnet50d"


@dataclass(frozen=True)
class Found:
    """A backbone in a file: the tensors under the names of `architecture`, and where they were."""

    architecture: str
    state: dict[str, Tensor]
    prefix: str
    names: str  # whose names they had: a key of NAMES
    left_out: tuple[str, ...]  # heads, queues, optimizers' averages

    def __str__(self) -> str:
        where = f"behind the prefix '{self.prefix}'" if self.prefix else "without a prefix"
        left = f", left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.architecture} in {self.names}'s names, {where}{left}"


def read(path: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, a torch checkpoint or a pickle of arrays, under the names they have there.
    `data`: its content, where that was read already."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load, load_file

            return load_file(path) if data is None else load(data)
        if path.suffix == ".pkl":
            content = _Arrays(io.BytesIO(path.read_bytes() if data is None else data)).load()
        else:
            content = load_plain(path if data is None else io.BytesIO(data))
    except Exception as error:  # each reader has its own kinds for a damaged file
        raise CheckpointError(refusal(path, error)) from None
    for key in INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return _tensors(path, content)


def load_plain(file: Path | io.BytesIO, map_location: Any = "cpu") -> Any:
    """What torch.save wrote, if it is tensors and plain values. torch does not look at the checksums in its archives,
    and its warnings are of files that it refuses or reads all the same."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if (wrong := archive.testzip()) is not None:
                raise ValueError(f"{wrong} in it is damaged: copy it again")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location=map_location, weights_only=True)


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, Mapping) else ()
    arrays = {str(name): value for name, value in items if isinstance(value, Tensor | np.ndarray)}
    if not arrays:
        raise CheckpointError(f"{path} holds no tensors by name, nor under {', '.join(INSIDE)}: give a checkpoint")
    return {name: torch.as_tensor(value) for name, value in arrays.items()}


class _Arrays(pickle.Unpickler):
    """Reads dictionaries of numpy arrays and nothing else: a pickle may name any function to be called."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # as numpy 1 called it
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def find(tensors: dict[str, Tensor], path: Path, architecture: str | None = None, prefix: str | None = None) -> Found:
    """The one backbone in these tensors. `architecture` and `prefix` say what cannot be found."""
    prefix = f"{prefix.rstrip('.')}." if prefix else prefix
    candidates = [
        found
        for names, where in _places(tensors, architecture)
        if prefix in (None, where) and (found := _fit(tensors, names, where, architecture)) is not None
    ]
    if not candidates:
        raise CheckpointError(_nothing(tensors, path, architecture, prefix))
    learners = [found for found in candidates if not AVERAGE.search(found.prefix)] or candidates
    first = learners[0]
    for other in learners[1:]:
        if any(not torch.equal(first.state[name], other.state[name]) for name in first.state):
            known = ", ".join(repr(found.prefix) for found in learners)
            raise CheckpointError(f"{path} holds several networks, behind {known}: say which one with --prefix{ALONE}")
    return first


def _places(tensors: dict[str, Tensor], architecture: str | None) -> list[tuple[str, str]]:
    """(whose names, prefix) of all that may be the start of a backbone."""
    places = []
    for names, (first, _) in NAMES.items():
        if names == "torchvision" and architecture is not None:
            first = next(iter(_shapes(architecture)))
        for name, tensor in tensors.items():
            of_images = architecture is not None or (tensor.ndim == 4 and tensor.shape[1] == 3)
            if of_images and (name == first or name.endswith(f".{first}")):
                places.append((names, name.removesuffix(first)))
    return places


def _behind(tensors: dict[str, Tensor], names: str, prefix: str) -> dict[str, Tensor]:
    rename = NAMES[names][1]
    return {rename(name.removeprefix(prefix)): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fit(tensors: dict[str, Tensor], names: str, prefix: str, architecture: str | None) -> Found | None:
    state = _behind(tensors, names, prefix)
    for candidate in _candidates(architecture):
        if not misfits(state, candidate):
            shapes = _shapes(candidate)
            own = {name: state[name] for name in shapes if name in state}
            others = {name.split(".")[0] for name in state if name not in own}
            outside = (name.removeprefix("module.") for name in tensors if not name.startswith(prefix))
            others |= {name.split(".")[0] for name in outside}
            return Found(candidate, own, prefix, names, tuple(sorted(others)))
    return None


def _candidates(architecture: str | None) -> Iterator[str]:
    """Without an architecture all that can be built here; one may need a library that is not installed."""
    for name in [architecture] if architecture else backbones.names():
        try:
            _shapes(name)
        except ConfigError:
            if architecture:
                raise
        else:
            yield name


def misfits(state: Mapping[str, Tensor], architecture: str) -> list[str]:
    """In what these tensors are not those of that architecture; a head beside them is none of it."""
    shapes = _shapes(architecture)
    parts = {name.split(".")[0] for name in shapes}
    wrong = [
        f"{name} is missing" if name not in state else f"{name} is {list(state[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if not name.endswith("num_batches_tracked") and (name not in state or state[name].shape != shape)
    ]
    return wrong + [f"{name} is too much" for name in state if name not in shapes and name.split(".")[0] in parts]


@functools.cache
def _shapes(architecture: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in backbones.build(architecture).state_dict().items()}


def _nothing(tensors: dict[str, Tensor], path: Path, architecture: str | None, prefix: str | None) -> str:
    """The sentence for a file in which no backbone was found: how near the nearest came."""
    near = []
    for names, where in _places(tensors, architecture):
        if prefix in (None, where):
            state = _behind(tensors, names, where)
            near += [(misfits(state, candidate), candidate, where) for candidate in _candidates(architecture)]
    if not near:
        names = ", ".join(list(tensors)[:3])
        return f"{path} holds no network of mls (its names: {names}, …): {ARCHITECTURE}"
    wrong, candidate, where = min(near, key=lambda one: len(one[0]))
    return (
        f"what {path} holds behind '{where}' is no backbone that mls knows, and {len(wrong)} names away from "
        f"{candidate} ({', '.join(wrong[:3])}): {ARCHITECTURE}, or repair the file"
    )
