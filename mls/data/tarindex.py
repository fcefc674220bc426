"""The index of tar shards: one pass over the headers gives (offset, size, classes) of every image, cached in a
file. Reading images with it is in tar.py."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64
from pydantic_core import from_json
from torch.utils.data import Dataset

from mls.data.listing import Names, is_image, show
from mls.data.loader import cores, in_workers
from mls.errors import DataError, UserError
from mls.files import atomic_file

LARGEST_LABEL = 1 << 16  # larger numbers are identifiers, not classes
LARGEST_JSON = 1 << 20  # bytes
INDEX_VERSION = 3
BLOCK = 512  # bytes, the unit of a tar file
CLOSING = 22 * BLOCK  # zeros: two blocks, and what fills a record of 20
WINDOW = 8 * BLOCK  # that are read together
FIELDS = Struct("100s 24x 12s 12x 8s 1s 188x 155s")  # of a header: name, size, checksum, kind, prefix
KINDS = (b"0", b"\0", b"5")  # of plain headers: files and folders
IDLE = (b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname")  # of extended headers
LARGE = 1 << 28  # bytes of shards from which on several processes read their headers

Progress = Callable[[int, int], None]  # (bytes done, total bytes)


@dataclass
class Part:
    """The index of one shard, valid for a file of this size and time."""

    stamp: list[int]  # size, modification time in ns
    table: Int64[np.ndarray, "images 4"]  # offset, size, number of classes, CRC-32 (the last two -1: unknown)
    classes: Int64[np.ndarray, "labels"]  # of all images, concatenated
    names: Names
    damage: str = ""
    counted: int = 0  # the most images that this shard was ever seen to have

    @property
    def fingerprint(self) -> str:
        """The same for the same images at the same places with the same classes."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.table, self.classes, self.names.text, self.names.starts):
            digest.update(f"{len(array)} ".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_index(shards: Sequence[Path], progress: Progress | None = None) -> list[Part]:
    """The index of every shard: from a cache file if size and time still agree, else from the shard's headers."""
    files = index_files(shards)
    stamps = [stamp_of(shard) for shard in shards]
    known = [(i, part) for file in files for i, part in enumerate(_load(file)) if i < len(stamps)]
    parts = {i: part for i, part in known if part.stamp == stamps[i]}
    stale = [i for i in range(len(shards)) if i not in parts]
    total, done = sum(stamps[i][0] for i in stale), 0
    bar = IndexingBar()
    report = progress or bar.report
    workers = min(len(stale), cores()) if total > LARGE and len(stale) > 1 else 0
    within = _untold if workers else lambda place: report(done + place, total)
    scans = _Scans([(shards[i], stamps[i]) for i in stale], within)
    try:
        for i, part in zip(stale, in_workers(scans, workers), strict=True):
            parts[i] = part
            done += stamps[i][0]
            report(done, total)
    finally:
        bar.close()
    for i, part in known:
        parts[i].counted = max(parts[i].counted, part.counted)
    complete = [parts[i] for i in range(len(shards))]
    if stale:
        _save(files, complete)
    return complete


class _Scans(Dataset[Part | UserError]):
    """An item is the index of one shard, or why there is none."""

    def __init__(self, shards: Sequence[tuple[Path, list[int]]], progress: Callable[[int], None]) -> None:
        self.shards, self.progress = shards, progress

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Part | UserError:
        try:
            return scan(*self.shards[number], self.progress)
        except UserError as error:
            return error


def _untold(place: int) -> None:
    """Nobody asks a worker process how far it is."""


def scan(shard: Path, stamp: list[int], progress: Callable[[int], None] = _untold) -> Part:
    """One pass over a shard's headers; of the contents only labels are read. A truncated image is left out."""
    images: dict[bytes, tuple[bytes, int, int]] = {}
    about: dict[bytes, tuple[list[int] | None, int]] = {}
    damage = ""
    try:
        with open(shard, "rb") as file:
            for number, (name, offset, size) in enumerate(_members(file)):
                folder, _, base = name.rpartition(b"/")
                stem, _, suffix = base.partition(b".")
                key = folder + b"/" + stem
                if suffix in (b"cls", b"json"):
                    if stem and size <= LARGEST_JSON:
                        about.setdefault(key, _about(read_at(file.fileno(), offset, size), suffix))
                elif stem and is_image(base):
                    plain = key in images and b"." not in suffix and b"." in _suffix(images[key][0])
                    if key not in images or plain:  # x.jpg is the image of x, x.mask.png only if nothing else is
                        images[key] = (name, offset, size)
                if number % 256 == 0:
                    progress(offset)
    except (tarfile.TarError, ValueError) as error:
        damage = str(error)
    except OSError as error:
        raise DataError(f"cannot read {show(shard)} ({error.strerror}): make it readable, or leave it out") from None
    whole = {key: image for key, image in images.items() if image[1] + image[2] <= stamp[0]}
    if damage and not whole:
        raise DataError(f"{show(shard)} is not a readable tar ({damage}): write it again, without compression")
    known = [about.get(key, (None, -1)) for key in whole]
    counts = [-1 if classes is None else len(classes) for classes, _ in known]
    rows = [(*image[1:], count, crc) for image, count, (_, crc) in zip(whole.values(), counts, known, strict=True)]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    flat = np.array([j for classes, _ in known for j in classes or ()], dtype=np.int64)
    return Part(stamp, table, flat, Names.of([image[0] for image in whole.values()]), damage, len(whole))


Member = tuple[bytes, int, int]  # the name of a regular file; offset and size of its content


def _members(file: BinaryIO) -> Iterator[Member]:
    """The regular files of a tar. Raises TarError for damage, also where tarfile itself would stop without an error."""
    file.seek((yield from _plain_members(file)))
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] -- tarfile would store every header
            if member.isreg() and not member.issparse():
                yield member.name.encode("utf-8", "surrogateescape"), member.offset_data, member.size
        file.seek(tar.offset)
    _look_behind(file)


def _plain_members(file: BinaryIO) -> Generator[Member, None, int]:
    """The same as far as headers are as plain as almost all are, in a tenth of tarfile's time. Gives back where the
    first other one is: the end, damage, or what tarfile knows better."""
    place, begin, window, end = 0, 0, b"", os.fstat(file.fileno()).st_size
    while True:
        if place > end:
            raise tarfile.ReadError("unexpected end of data")
        if not begin <= place <= begin + len(window) - WINDOW // 2:
            begin, window = place, os.pread(file.fileno(), WINDOW, place)
        at, data = place - begin, place + BLOCK
        found = _header(window[at : at + BLOCK])
        if found is not None and found[1] == b"x" and 0 < found[2] <= BLOCK:
            if not _says_nothing(window[at + BLOCK : at + BLOCK + found[2]]):
                return place
            found, data = _header(window[at + 2 * BLOCK : at + 3 * BLOCK]), place + 3 * BLOCK
        if found is None or found[1] not in KINDS:
            return place
        name, kind, size = found
        if kind == b"5":
            place = data
            continue
        yield name, data, size
        place = data + -(-size // BLOCK) * BLOCK


def _header(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Name, type and size, where they are written in the plain way and the checksum is right."""
    if len(block) < BLOCK:
        return None
    name, size, checksum, kind, prefix = FIELDS.unpack_from(block)
    octal, total = size.partition(b"\0")[0].strip(), checksum.partition(b"\0")[0].strip()
    if not (octal.isdigit() and total.isdigit()):  # the other way is binary
        return None
    try:
        length, total = int(octal, 8), int(total, 8) + sum(checksum) - 8 * 32  # it counts as spaces
    except ValueError:  # 8 and 9 are not octal
        return None
    if zlib.adler32(block) & 0xFFFF != (total + 1) % 65521:  # the sum of the bytes in a twentieth of sum()'s time
        return None
    name, prefix = name.partition(b"\0")[0], prefix.partition(b"\0")[0]
    if kind == b"\0" and name.endswith(b"/"):  # a folder, in the oldest format
        return None
    return (prefix + b"/" + name if prefix else name), kind, length


def _says_nothing(extended: bytes) -> bool:
    """Whether an extended header has only records that change neither name nor content: times and owners."""
    while extended:
        digits, _, rest = extended.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(extended) or extended[length - 1 : length] != b"\n":
            return False
        if rest.partition(b"=")[0] not in IDLE:
            return False
        extended = extended[length:]
    return True


def _look_behind(file: BinaryIO) -> None:
    """To tarfile any header of zeros is the end, one that was overwritten in the middle too; and a file whose end was
    never written to the disk is filled up with zeros."""
    zeros = 0
    while chunk := file.read(1 << 20):
        if chunk.count(0) < len(chunk):
            raise tarfile.ReadError("more follows after a header of zeros")
        zeros += len(chunk)
    if zeros < BLOCK:
        raise tarfile.ReadError("the closing block is missing")
    if zeros > CLOSING:
        raise tarfile.ReadError(f"its last {zeros:,} bytes are zeros")


def _suffix(name: bytes) -> bytes:
    return name.rpartition(b"/")[2].partition(b".")[2]


def _about(content: bytes, suffix: bytes) -> tuple[list[int] | None, int]:
    """The class if the content is one plain number, or the numbers that a .json lists as `classes`; and the CRC-32 that
    `mls data pack` has noted, else -1. A list of another name is not used: it could be class numbers or a row of zeros
    and ones.

    >>> _about(b"3", b"cls"), _about(b'{"classes": [0, 4], "crc32": 7}', b"json"), _about(b'{"label": [0, 1]}', b"json")
    (([3], -1), ([0, 4], 7), (None, -1))
    >>> _about('{"classes": [4]}'.encode("utf-16"), b"json")
    ([4], -1)
    """
    try:
        value = from_json(content)
    except ValueError:  # in a few ways json takes more, such as UTF-16
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return None, -1
    listed, crc = None, -1
    if suffix == b"json" and isinstance(value, dict):
        crc = value.get("crc32", -1)
        listed, value = value.get("classes"), value.get("label", value.get("labels"))
    values: list[Any] = listed if isinstance(listed, list) else [value]
    classes = values if all(type(j) is int and 0 <= j < LARGEST_LABEL for j in values) else None
    return classes, crc if type(crc) is int and 0 <= crc < 1 << 32 else -1


def stamp_of(shard: Path) -> list[int]:
    try:
        status = shard.stat()
    except OSError as error:
        raise DataError(f"cannot read {show(shard)} ({error.strerror}): put it back, or pack again") from None
    return [status.st_size, status.st_mtime_ns]


def index_files(shards: Sequence[Path]) -> list[Path]:
    """Candidates for the index file: beside the shards, for all users of them, or else in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    full = [os.path.abspath(shard) for shard in shards]
    near = [os.path.relpath(shard, shards[0].parent) for shard in shards]
    return [shards[0].parent / f".mls-index-{_digest(near)}.npz", Path(home, "mls", f"index-{_digest(full)}.npz")]


def _digest(names: list[str]) -> str:
    return hashlib.blake2b(b"\0".join(map(os.fsencode, names)), digest_size=8).hexdigest()


def _save(files: Sequence[Path], parts: list[Part]) -> None:
    """Write the first file that is writable; if none is, the index is made again each time."""
    keys = ("stamp", "images", "damage", "most")
    head = [dict(zip(keys, (part.stamp, len(part.names), part.damage, part.counted), strict=True)) for part in parts]
    names = Names.join([part.names for part in parts])
    table = np.concatenate([part.table for part in parts])
    classes = np.concatenate([part.classes for part in parts])
    content = np.frombuffer(json.dumps({"version": INDEX_VERSION, "shards": head}).encode(), dtype=np.uint8)
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as opened:
                np.savez(opened, head=content, table=table, classes=classes, text=names.text, starts=names.starts)
            return
        except (OSError, UserError):
            continue


def _load(file: Path) -> list[Part]:
    """The index in a cache file; empty if there is none or it is invalid."""
    try:
        with open(file, "rb") as opened, np.load(opened) as content:
            head = json.loads(content["head"].tobytes())
            table, classes, names = content["table"], content["classes"], Names(content["text"], content["starts"])
        ends = np.cumsum([0, *(shard["images"] for shard in head["shards"])]).tolist()
        if head["version"] != INDEX_VERSION or len(table) != ends[-1] or len(names) != ends[-1]:
            return []
        labels = np.concatenate([[0], table[:, 2].clip(0).cumsum()])  # where an image's classes begin
        if len(classes) != labels[-1]:
            return []
        return [
            Part(one["stamp"], table[a:b], classes[labels[a] : labels[b]], names.part(a, b), one["damage"], one["most"])
            for one, a, b in zip(head["shards"], ends, ends[1:], strict=False)
        ]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return []


class IndexingBar:
    """A progress bar that appears only after `after` seconds."""

    def __init__(self, after: float = 2.0, text: str = "indexing tar shards") -> None:  # seconds
        self._begin, self._text = time.monotonic() + after, text
        self._bar: Any = None

    def report(self, done: int, total: int) -> None:
        if self._bar is None and time.monotonic() > self._begin:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._bar.add_task(self._text)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # one call reads at most 2 GiB, and on a network disk often less than requested
    return data
