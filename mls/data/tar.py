"""Images in tar shards, in WebDataset's convention: every image is one read at an offset from the index (tarindex.py).
Nothing is extracted to disk. Shards behind a URL are downloaded first (remote.py)."""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mls.data.listing import LOOKED_FOR, Names, multi_hot, multi_hot_of, printable, show
from mls.data.tarindex import IndexingBar, Part, Progress, index_files, load_index, read_at, scan, stamp_of
from mls.errors import DataError
from mls.files import changed, sha256
from mls.streams import generator

if TYPE_CHECKING:
    cached_property = property  # pyright takes no cached_property for the property of a protocol, here of Source
else:
    from functools import cached_property

__all__ = ["IndexingBar", "TarSource", "expand_braces", "load_index"]

WINDOW = 8  # shards whose images are shuffled together
OPEN_SHARDS = 64  # open files of a process; the usual limit is 1,024
MANIFEST = "manifest.json"  # what `mls data pack` writes beside its shards

log = logging.getLogger(__name__)


class TarSource:
    """The images of tar shards, numbered in the order of the shards and of their members.

    A member's key is its path up to the first dot of its base name, and a key has one image. `.cls`, or `label` or
    `labels` in `.json`, gives a class if it is a plain number, `classes` in `.json` several; labels are used if
    every image has some. Members are never extracted, so names such as "../x.jpg" are harmless; links and devices are
    skipped. Of a damaged shard the complete images are used, and it is told each time. Shards of `mls data pack` must
    be those that their manifest lists, and an image must have the checksum with which it was packed.
    """

    class_names: list[str] | None

    def __init__(self, shards: Sequence[Path], limit: int | None = None, progress: Progress | None = None) -> None:
        records, manifest = _records(shards), read_manifest(shards[0].parent)
        parts = load_index(shards, progress)
        _compare(records, shards, parts)
        for shard, what in _suspicions(records, shards, parts).items():
            log.warning("%s %s", show(shard), what)
        starts = np.cumsum([0, *(len(part.names) for part in parts)])
        if not starts[-1]:
            raise DataError(f"no images in {len(shards)} shards from {show(shards[0])} on ({LOOKED_FOR}): name others")
        count = min(int(starts[-1]), limit or int(starts[-1]))
        table = np.concatenate([part.table for part in parts])
        foreign = np.repeat([record is None for record in records], np.diff(starts))
        table[foreign, 3] = -1  # a field of the same name of another program could be anything
        classes = np.concatenate([part.classes for part in parts])
        self.class_names = None  # from all images, so that data.limit does not change the classes
        if table[:, 2].min() >= 0 and len(classes):
            self.class_names = _class_names(manifest, classes.max() + 1)
        self._classes = classes[: table[:count, 2].clip(0).sum()].copy()
        self.name = f"tar:{show(shards[0].name)}" + (f"+{len(shards) - 1}" if len(shards) > 1 else "")
        self._shards = [os.fsencode(shard) for shard in shards]
        self._table, self._starts = table[:count].copy(), starts.clip(max=count)
        self._names = Names.join([part.names for part in parts]).part(0, count)
        self._open = lru_cache(OPEN_SHARDS)(_Descriptor)

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def labels(self) -> Float[Tensor, "images classes"] | None:
        return None if self.class_names is None else multi_hot(self._pairs(), len(self), len(self.class_names))

    def labels_of(self, ids: Int64[Tensor, " some"]) -> Float[Tensor, "some classes"]:
        """Of these images alone, without the matrix of all."""
        assert self.class_names is not None
        return multi_hot_of(ids, self._pairs(), len(self), len(self.class_names))

    def _pairs(self) -> Int64[np.ndarray, "pairs 2"]:
        return np.stack([np.repeat(np.arange(len(self)), self._table[:, 2]), self._classes], axis=1)

    def read(self, index: int) -> bytes:
        offset, size, _, crc = self._table[index].tolist()
        shard = self._shard_of(index)
        data = read_at(self._open(shard).number, offset, size)
        if len(data) < size:
            raise OSError(f"{printable(shard)} became shorter after it was indexed")
        if crc >= 0 and zlib.crc32(data) != crc:
            raise OSError(f"its bytes in {printable(shard)} are not those that were packed")
        return data

    def odd_shards(self) -> Iterator[tuple[str, str, str]]:
        """(kind, shard, detail) of those that are not what was packed or indexed. Each is read anew: a disk may fail
        without a new time on the file."""
        shards = [Path(os.fsdecode(shard)) for shard in self._shards]
        parts, records = load_index(shards), _records(shards)
        suspicions = _suspicions(records, shards, parts)
        for shard, part, record in zip(shards, parts, records, strict=True):
            fresh = scan(shard, stamp_of(shard))
            if fresh.damage or shard in suspicions:
                yield "damaged shard", show(shard), fresh.damage or suspicions[shard]
            elif record is not None and sha256(shard) != record["sha256"]:
                yield "changed shard", show(shard), f"its SHA-256 is not that of {MANIFEST}"
            elif fresh.fingerprint != part.fingerprint:
                yield "changed shard", show(shard), "other headers than those in the index"

    def size(self, index: int) -> int:
        return int(self._table[index, 1])

    def describe(self, index: int) -> str:
        return f"{printable(self._shard_of(index))}:{printable(self._names[index])}"

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Shards are shuffled, then the images of each WINDOW shards, so that reads in a shard stay close together.

        This is the order of the whole epoch, which is cut into batches afterwards: the content of a batch depends
        neither on the number of workers nor of processes, as it would if every worker streamed its own shards.
        """
        draw = generator(seed, "order", epoch)
        shards = torch.randperm(len(self._shards), generator=draw).numpy()
        starts, pieces = self._starts.tolist(), []
        for first in range(0, len(shards), WINDOW):
            window = shards[first : first + WINDOW]
            ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in window])
            pieces.append(ids[torch.randperm(len(ids), generator=draw).numpy()])
        return np.concatenate(pieces)

    def _shard_of(self, index: int) -> bytes:
        return self._shards[int(np.searchsorted(self._starts, index, side="right")) - 1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(OPEN_SHARDS)(_Descriptor)  # file descriptors are not shared with other processes


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `mls data pack`; empty for shards of other programs."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(found, dict) or not {"packing", "check"} & found.keys():
            return {}
        records = list(found["shards"].values())
        whole = not changed(found) and all({"images", "bytes", "sha256"} <= record.keys() for record in records)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, KeyError, AttributeError):
        whole = False
    if not whole:
        advice = "pack again into a new folder, or delete it to read the shards as those of another program"
        raise DataError(f"{show(folder / MANIFEST)} is damaged: {advice}")
    return found


def shards_in(folder: Path) -> list[Path]:
    """Those that are there and those that ought to be."""
    names = {path.name for path in folder.glob("*.tar")} | read_manifest(folder).get("shards", {}).keys()
    return [folder / name for name in sorted(names)]


def _records(shards: Sequence[Path]) -> list[dict[str, Any] | None]:
    """What the manifest beside each shard says of it; None where there is no manifest."""
    manifests = {folder: read_manifest(folder) for folder in dict.fromkeys(shard.parent for shard in shards)}
    for folder, manifest in manifests.items():
        if manifest.get("complete") is False:
            raise DataError(f"the pack in {show(folder)} is not finished: run its `mls data pack` again")
    beside = [manifests[shard.parent] for shard in shards]
    return [one["shards"].get(shard.name, {}) if one else None for one, shard in zip(beside, shards, strict=True)]


def _compare(records: Sequence[dict[str, Any] | None], shards: Sequence[Path], parts: Sequence[Part]) -> None:
    """Refuse shards that are not those of their manifest, as far as sizes and headers tell."""
    odd = []
    for record, shard, part in zip(records, shards, parts, strict=True):
        if record is None:
            continue
        packed = record.get("index", part.fingerprint), record.get("bytes"), record.get("images")
        if packed != (part.fingerprint, part.stamp[0], len(part.names)):
            some = f"{packed[2]} images in {packed[1]:,} bytes" if record else "nothing"
            odd.append(f"{show(shard)} has {len(part.names)} images in {part.stamp[0]:,} bytes, {some} packed")
    if odd:
        raise DataError(
            f"{len(odd)} of {len(shards)} shards are not those of the {MANIFEST} beside them ({'; '.join(odd[:3])}): "
            f"run their `mls data pack` again, or delete {MANIFEST} to train on what is left"
        )


def _suspicions(
    records: Sequence[dict[str, Any] | None], shards: Sequence[Path], parts: Sequence[Part]
) -> dict[Path, str]:
    """What is wrong with shards of which no manifest says what they ought to hold."""
    found = {}
    for record, shard, part in zip(records, shards, parts, strict=True):
        if record is None and part.damage:
            found[shard] = f"is damaged ({part.damage}): using its first {len(part.names)} images"
        elif record is None and len(part.names) < part.counted:
            kept = " or ".join(show(file) for file in index_files(shards) if file.exists())
            found[shard] = f"had {part.counted} images before and has {len(part.names)} now: delete {kept} if it may"
    return found


def _class_names(manifest: dict[str, Any], count: int) -> list[str]:
    """The manifest's, if it has at least `count`; else the numbers."""
    names = manifest.get("classes")
    if isinstance(names, list) and len(names) >= count and all(isinstance(name, str) for name in names):
        return names
    return [str(j) for j in range(count)]


class _Descriptor:
    """An open shard, closed with its last reference: another thread may still read from one that the cache has dropped.
    Forked workers can share it, since reads at an offset do not move the file position."""

    def __init__(self, path: bytes) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def expand_braces(pattern: str) -> list[str]:
    """
    >>> expand_braces("{0..1}/shard-{008..010}.tar")[:4]
    ['0/shard-008.tar', '0/shard-009.tar', '0/shard-010.tar', '1/shard-008.tar']
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [rest for n in numbers for rest in expand_braces(pattern[: found.start()] + n + pattern[found.end() :])]
