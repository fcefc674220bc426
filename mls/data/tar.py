"""Images in tar shards, WebDataset's convention. One pass over the headers makes an index of (shard, offset, size),
kept in a file; after that every image is one read at a known place. Nothing is ever extracted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mls.data.listing import LOOKED_FOR, Names, is_image, multi_hot, printable, show
from mls.errors import DataError, UserError
from mls.files import atomic_file
from mls.streams import generator

WINDOW = 8  # shards whose images are mixed with each other
OPEN_SHARDS = 64  # descriptors held by a process; the usual limit is 1,024 files
LARGEST_LABEL = 1 << 16  # a greater number is an identifier, not a class
LARGEST_JSON = 1 << 20  # bytes
INDEX_VERSION = 1
BLOCK = 512  # tar's unit

Progress = Callable[[int, int], None]  # bytes passed, bytes in all
log = logging.getLogger(__name__)


class TarSource:
    """The images of tar shards, numbered in the order of the shards and of their members.

    A member's key is its path up to the first dot of its base name, and a key has one image. `.cls`, or `label` or
    `labels` in `.json`, gives a class if it is a plain number and every image has one. Names are only read, so
    "../x.jpg" is harmless; links and devices are passed over. A shard that was cut off is used as far as it goes.
    """

    class_names: list[str] | None

    def __init__(self, shards: Sequence[Path], limit: int | None = None, progress: Progress | None = None) -> None:
        parts = load_index(shards, progress)
        for shard, part in zip(shards, parts, strict=True):
            if part.damage:
                log.warning("%s is damaged (%s): using its first %d images", show(shard), part.damage, len(part.names))
        starts = np.cumsum([0, *(len(part.names) for part in parts)])
        if not starts[-1]:
            raise DataError(f"no images in {len(shards)} shards from {show(shards[0])} on ({LOOKED_FOR}): name others")
        count = min(int(starts[-1]), limit or int(starts[-1]))
        table = np.concatenate([part.table for part in parts])
        classes = table[:, 2]  # of all images, so that data.limit does not change the classes
        labelled = classes.min() >= 0 and classes.max() < LARGEST_LABEL
        self.class_names = [str(j) for j in range(classes.max() + 1)] if labelled else None
        self.name = f"tar:{show(shards[0].name)}" + (f"+{len(shards) - 1}" if len(shards) > 1 else "")
        self._shards = [os.fsencode(shard) for shard in shards]
        self._table, self._starts = table[:count].copy(), starts.clip(max=count)
        self._names = Names.join([part.names for part in parts]).part(0, count)
        self._open = lru_cache(OPEN_SHARDS)(_Descriptor)

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def labels(self) -> Float[Tensor, "images classes"] | None:
        if self.class_names is None:
            return None
        pairs = np.stack([np.arange(len(self)), self._table[:, 2]], axis=1)
        return multi_hot(pairs, len(self), len(self.class_names))

    def read(self, index: int) -> bytes:
        offset, size = self._table[index, :2].tolist()
        shard = self._shard_of(index)
        data = _read_at(self._open(shard).number, offset, size)
        if len(data) < size:
            raise OSError(f"{printable(shard)} became shorter after it was indexed")
        return data

    def describe(self, index: int) -> str:
        return f"{printable(self._shard_of(index))}:{printable(self._names[index])}"

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Shards are shuffled, then the images of each few shards among themselves, so that reads stay close together.

        This is the order of the whole epoch, cut into batches afterwards: what is in a batch depends neither on the
        number of workers nor on that of processes, as it would if every worker streamed its own shards.
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
        self._open = lru_cache(OPEN_SHARDS)(_Descriptor)  # descriptors belong to one process


class _Descriptor:
    """An open shard, closed when nobody holds it any more: another thread may still read what the cache dropped.
    A forked worker inherits it safely, since reads at an offset do not move the shared position."""

    def __init__(self, path: bytes) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # one call gives at most 2 GiB, and on a network disk often less than asked
    return data


@dataclass
class Part:
    """The index of one shard, valid for a file of this size and time."""

    stamp: list[int]  # size, modification time in ns
    table: Int64[np.ndarray, "images 3"]  # offset, size, class or -1
    names: Names
    damage: str = ""


def load_index(shards: Sequence[Path], progress: Progress | None = None) -> list[Part]:
    """The index of every shard: from a cache file where that is still true, else from the shard's headers."""
    files = _index_files(shards)
    stamps = [_stamp(shard) for shard in shards]
    parts = {
        i: part for file in files for i, part in enumerate(_load(file)) if i < len(stamps) and part.stamp == stamps[i]
    }
    stale = [i for i in range(len(shards)) if i not in parts]
    total, done = sum(stamps[i][0] for i in stale), 0
    bar = IndexingBar()
    report = progress or bar.report
    try:
        for i in stale:
            parts[i] = scan(shards[i], stamps[i], lambda place, before=done: report(before + place, total))
            done += stamps[i][0]
            report(done, total)
    finally:
        bar.close()
    complete = [parts[i] for i in range(len(shards))]
    if stale:
        _save(files, complete)
    return complete


def scan(shard: Path, stamp: list[int], progress: Callable[[int], None] = lambda place: None) -> Part:
    """One pass over a shard's headers; of the contents only labels are read. What was cut off stays out."""
    images: dict[bytes, tuple[bytes, int, int]] = {}
    classes: dict[bytes, int] = {}
    damage = ""
    try:
        with open(shard, "rb") as file:
            for number, member in enumerate(_members(file)):
                name = member.name.encode("utf-8", "surrogateescape")
                folder, _, base = name.rpartition(b"/")
                stem, _, suffix = base.partition(b".")
                key = folder + b"/" + stem
                if stem and is_image(base):
                    plain = key in images and b"." not in suffix and b"." in _suffix(images[key][0])
                    if key not in images or plain:  # x.jpg is the image of x, x.mask.png only if nothing else is
                        images[key] = (name, member.offset_data, member.size)
                elif suffix in (b"cls", b"json") and stem and member.size <= LARGEST_JSON:
                    classes.setdefault(key, _class(_read_at(file.fileno(), member.offset_data, member.size), suffix))
                if number % 256 == 0:
                    progress(member.offset)
    except (tarfile.TarError, ValueError) as error:
        damage = str(error)
    except OSError as error:
        raise DataError(f"cannot read {show(shard)} ({error.strerror}): make it readable, or leave it out") from None
    whole = {key: image for key, image in images.items() if image[1] + image[2] <= stamp[0]}
    if damage and not whole:
        raise DataError(f"{show(shard)} is not a readable tar ({damage}): write it again, without compression")
    rows = [(offset, size, classes.get(key, -1)) for key, (_, offset, size) in whole.items()]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Part(stamp, table, Names.of([image[0] for image in whole.values()]), damage)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar. Raises TarError where it is damaged, which tarfile itself passes over at times."""
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] -- tarfile would keep every header
            if member.isreg() and not member.issparse():
                yield member
        file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError("the closing block is missing")


def _suffix(name: bytes) -> bytes:
    return name.rpartition(b"/")[2].partition(b".")[2]


def _class(content: bytes, suffix: bytes) -> int:
    """The class if the content is one plain number, else -1."""
    try:
        value = json.loads(content)
    except ValueError:
        return -1
    if suffix == b"json" and isinstance(value, dict):
        value = value.get("label", value.get("labels"))
    return value if type(value) is int and 0 <= value < LARGEST_LABEL else -1


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


def _stamp(shard: Path) -> list[int]:
    status = shard.stat()
    return [status.st_size, status.st_mtime_ns]


def _index_files(shards: Sequence[Path]) -> list[Path]:
    """Where the index may lie: beside the shards, so that all who use them share it, else in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    full = [os.path.abspath(shard) for shard in shards]
    near = [os.path.relpath(shard, shards[0].parent) for shard in shards]
    return [shards[0].parent / f".mls-index-{_digest(near)}.npz", Path(home, "mls", f"index-{_digest(full)}.npz")]


def _digest(names: list[str]) -> str:
    return hashlib.blake2b(b"\0".join(map(os.fsencode, names)), digest_size=8).hexdigest()


def _save(files: Sequence[Path], parts: list[Part]) -> None:
    """Into the first place that can be written; without one the index is made anew each time."""
    head = [{"stamp": part.stamp, "images": len(part.names), "damage": part.damage} for part in parts]
    names = Names.join([part.names for part in parts])
    table = np.concatenate([part.table for part in parts])
    content = np.frombuffer(json.dumps({"version": INDEX_VERSION, "shards": head}).encode(), dtype=np.uint8)
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as opened:
                np.savez(opened, head=content, table=table, text=names.text, starts=names.starts)
            return
        except (OSError, UserError):
            continue


def _load(file: Path) -> list[Part]:
    """What a cache file says, or nothing if there is none or it makes no sense."""
    try:
        with open(file, "rb") as opened, np.load(opened) as content:
            head = json.loads(content["head"].tobytes())
            table, names = content["table"], Names(content["text"], content["starts"])
        ends = np.cumsum([0, *(shard["images"] for shard in head["shards"])]).tolist()
        if head["version"] != INDEX_VERSION or len(table) != ends[-1] or len(names) != ends[-1]:
            return []
        slices = zip(head["shards"], ends, ends[1:], strict=False)
        return [Part(shard["stamp"], table[a:b], names.part(a, b), shard["damage"]) for shard, a, b in slices]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return []


class IndexingBar:
    """A progress bar that appears only if indexing takes longer than a moment."""

    def __init__(self, after: float = 2.0) -> None:  # seconds
        self._begin = time.monotonic() + after
        self._bar: Any = None

    def report(self, done: int, total: int) -> None:
        if self._bar is None and time.monotonic() > self._begin:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._bar.add_task("indexing tar shards")
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
