"""Frozen features of whole images, without augmentation, for the monitor, the demo and eval/. `cached_features` stores
them on disk, so that the same images never go through the same network twice."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset

from mls.config import AugmentConfig
from mls.data import Source
from mls.data.augment import normalise
from mls.data.crops import UnreadableImage, centre, decode
from mls.data.loader import in_workers
from mls.data.unreadable import Unreadable
from mls.errors import DataError, Stopped, UserError, reason
from mls.files import cache_folder, remove_unfinished, telling_disk_errors, write_atomically
from mls.locks import locked
from mls.models.finite import finite
from mls.progress import counting
from mls.signals import StopFlag

BLOCK = 256  # rows that are written and hashed together; a killed process loses at most one block
DISK_FULL = "free some, or set MLS_CACHE to another folder; the same call continues after the rows that are stored"


def embed(
    backbone: nn.Module,
    source: Source,
    ids: Sequence[int],
    config: AugmentConfig,
    device: torch.device | str = "cpu",
    batch: int = 250,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "images dim"]:
    """Features of the images `ids`, on the CPU; each image is centred and scaled to config.size."""
    features, done = [], 0
    with closing(embed_batches(backbone, source, ids, config, device, batch)) as batches:
        for part in batches:
            features.append(part)
            done += len(part)
            progress(done)
    return torch.cat(features)


def embed_batches(
    backbone: nn.Module,
    source: Source,
    ids: Sequence[int],
    config: AugmentConfig,
    device: torch.device | str = "cpu",
    batch: int = 250,
    workers: int = 0,
    unreadable: Unreadable | None = None,
) -> Generator[Float[Tensor, "batch dim"], None, None]:
    """The features of `embed`, a batch at a time; `workers` processes read and decode. An image that cannot be read is
    an error, or noted in `unreadable`, and its row is zeros."""
    dark: list[int] = []  # rows of the present batch

    def pixels() -> Iterator[UInt8[Tensor, "batch 3 size size"]]:
        for images, broken in in_workers(WholeImages(source, ids, config.size, batch, unreadable is not None), workers):
            if unreadable is not None:
                unreadable.note((image, f"{source.describe(image)}: {why}") for _, image, why in broken)
            dark[:] = [row for row, _, _ in broken]
            yield images

    for features in embed_pixels(backbone, pixels(), config, device, source.name):
        features[dark] = 0
        yield features


@torch.no_grad()
def embed_pixels(
    backbone: nn.Module,
    batches: Iterable[UInt8[Tensor, "batch 3 size size"]],
    config: AugmentConfig,
    device: torch.device | str,
    name: str,
) -> Generator[Float[Tensor, "batch dim"], None, None]:
    """The same of images that are decoded."""
    device, training = torch.device(device), backbone.training
    backbone.eval().to(device)
    try:
        for images in batches:
            yield finite(backbone(normalise(images, config, device)).float().cpu(), f"the features of {name}")
    finally:
        backbone.train(training)


Broken = list[tuple[int, int, str]]  # row, id and reason of images that cannot be read


class WholeImages(Dataset[tuple[UInt8[Tensor, "batch 3 size size"], Broken] | UserError]):
    """Item i is the i-th batch of the images `ids`; where one that cannot be read is no error, it is black."""

    def __init__(self, source: Source, ids: Sequence[int], size: int, batch: int, skip: bool = False) -> None:
        self.source, self.ids, self.size, self.batch, self.skip = source, ids, size, batch, skip

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch)

    def __getitem__(self, number: int) -> tuple[UInt8[Tensor, "batch 3 size size"], Broken] | UserError:
        ids = self.ids[number * self.batch : (number + 1) * self.batch]
        images, broken = torch.zeros(len(ids), 3, self.size, self.size, dtype=torch.uint8), []
        for row, index in enumerate(map(int, ids)):
            try:
                images[row] = centre(decode(self.source.read(index)), self.size)
            except (UnreadableImage, OSError) as error:
                if not self.skip:
                    advice = "`mls data check` finds all of them"
                    return DataError(f"{self.source.describe(index)} cannot be read ({reason(error)}): {advice}")
                broken.append((row, index, reason(error)))
        return images, broken


# ---------------------------------------------------------------------------------------------------- cache on disk


@dataclass(frozen=True)
class CachedFeatures:
    features: Float[Tensor, "images dim"]  # memory-mapped: the file is read on access. Do not write to them
    folder: Path
    sha256: str


def cached_features(
    facts: Mapping[str, Any],
    count: int,
    compute: Callable[[int], Generator[Float[Tensor, "batch dim"]]],
    title: str = "features",
    quiet: bool = False,
    block: int = BLOCK,
    half: bool = False,
) -> CachedFeatures:
    """`count` rows of features that depend on nothing but `facts` (plain values: hash of the weights, images, size):
    read from $MLS_CACHE/features, or computed and stored there. `compute(start)` yields the rows from `start` on, in
    order, in batches of any size.

    Rows are appended in blocks of so many, each with its hash: a killed process loses at most one block, and blocks
    that were damaged later are found and computed again. Another process that needs the same features waits for it.
    `half` stores fp16. `block` and `half` must follow from `facts`.
    """
    kind = "<f2" if half else "<f4"
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder("features") / key
    folder.mkdir(exist_ok=True)
    with locked(folder / ".lock", f"features in {folder} are being computed", wait=True):
        remove_unfinished(folder, "features.json")
        dim, blocks = _whole_blocks(folder, count, block, kind)
        if len(blocks) * block < count:
            start = len(blocks) * block
            with (
                StopFlag() as stop,
                counting(title, count, not quiet, start) as progress,
                closing(compute(start)) as batches,
            ):
                for rows in _in_blocks(batches, block, kind):
                    place, dim = start, rows.shape[1]
                    start += len(rows)
                    blocks.append(_append(folder, rows, place, count))
                    index = {"facts": dict(facts), "dim": dim, "blocks": blocks}
                    write_atomically(folder / "features.json", json.dumps(index).encode())
                    progress(start)
                    if stop.exit_code:
                        raise Stopped(f"a signal came: {start} of {count} rows of features are kept", stop.exit_code)
    # Mode c (copy on write): torch cannot make a tensor read-only, and a write must not change the file.
    stored = np.memmap(folder / "features.npy", kind, "c", len(_header(count, dim, kind)), (count, dim))
    return CachedFeatures(torch.from_numpy(stored), folder, hashlib.sha256("".join(blocks).encode()).hexdigest())


def hash_of_weights(backbone: nn.Module) -> str:
    """Of all tensors, and of the layers' settings that are not in tensors (strides, paddings)."""
    digest = hashlib.sha256(repr(backbone).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _whole_blocks(folder: Path, count: int, block: int, kind: str) -> tuple[int, list[str]]:
    """The width of the stored rows, and the hashes of the blocks before the first that is missing or damaged."""
    whole: list[str] = []
    try:
        index = json.loads((folder / "features.json").read_text())
        dim, header = index["dim"], _header(count, index["dim"], kind)
        with open(folder / "features.npy", "rb") as file:
            if file.read(len(header)) == header:
                for wanted in index["blocks"]:
                    rows = min(block, count - len(whole) * block)
                    data = file.read(np.dtype(kind).itemsize * rows * dim)
                    if hashlib.sha256(data).hexdigest() != wanted:
                        break
                    finite(torch.from_numpy(np.frombuffer(bytearray(data), kind)))  # version 0.1 stored any
                    whole.append(wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, []
    return dim, whole


def _in_blocks(batches: Iterator[Tensor], size: int, kind: str) -> Iterator[Float[np.ndarray, "rows dim"]]:
    """The same rows, so many at a time; the last block may be smaller."""
    waiting: list[Tensor] = []
    stored_as = torch.float16 if kind == "<f2" else torch.float32
    for batch in batches:
        waiting.append(finite(batch.detach().to("cpu", stored_as)))
        if sum(map(len, waiting)) >= size:
            *blocks, rest = torch.cat(waiting).split(size)
            if len(rest) == size:
                blocks, rest = [*blocks, rest], rest[:0]
            yield from (block.numpy() for block in blocks)
            waiting = [rest]
    if sum(map(len, waiting)):
        yield torch.cat(waiting).numpy()


def _append(folder: Path, block: Float[np.ndarray, "rows dim"], place: int, count: int) -> str:
    """Write the rows from `place` on; returns its hash once it is on the disk. With plain writes: writing through
    the memory map on a full disk would kill the process."""
    kind = block.dtype.newbyteorder("<").str
    header, data = _header(count, block.shape[1], kind), block.astype(kind).tobytes()
    path = folder / "features.npy"
    with telling_disk_errors(path, DISK_FULL), open(path, "r+b" if place else "wb") as file:
        if not place:
            file.write(header)
        file.seek(len(header) + block.itemsize * place * block.shape[1])
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _header(count: int, dim: int, kind: str) -> bytes:
    """The header of a .npy file, so that np.load can read it."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": (count, dim)})
    return out.getvalue()
