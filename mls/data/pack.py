"""`mls data pack`: packs many image files into few tar shards in WebDataset's layout, scaled down on request. Reading
shards is in tar.py."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from mls.data import Source
from mls.data.crops import SPARE
from mls.data.decode import MPO, Encoded, UnreadableImage
from mls.data.listing import FileSource, show
from mls.data.loader import in_workers
from mls.data.tar import MANIFEST, read_manifest
from mls.data.tarindex import load_index, scan, stamp_of
from mls.errors import DataError, UserError, reason
from mls.files import atomic_file, checked, remove_unfinished, sha256, telling_disk_errors, write_atomically
from mls.locks import Lock, locked

VERSION = 1
SUFFIXES = {"JPEG": "jpg", MPO: "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif"}
SUFFIXES |= {"PPM": "ppm", "AVIF": "avif", "HEIF": "heic"}
DISK_FULL = "free some and run the same command again: finished shards are kept"

Progress = Callable[[int], None]  # images done


@dataclass(frozen=True)
class Packing:
    """How images are packed. Two packs with the same settings of the same source are the same, byte for byte."""

    short_side: int | None = None  # pixels; a larger image is scaled down to it, a smaller one is not changed
    quality: int = 90  # of the JPEG files that scaled images become
    per_shard: int = 2000  # images


def pack(
    source: Source,
    out: Path,
    packing: Packing,
    workers: int = 0,
    progress: Progress = lambda done: None,
) -> dict[str, Any]:
    """Write the shards that are missing or damaged in `out`; returns the manifest.

    An image that cannot be read is left out and listed in the manifest with its reason.
    """
    count = -(-len(source) // packing.per_shard)
    names = [f"shard-{number:06d}.tar" for number in range(count)]
    with telling_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"{show(out)} is being packed") as lock:
        return _pack(source, out, packing, names, workers, progress, lock)


def _pack(
    source: Source,
    out: Path,
    packing: Packing,
    names: list[str],
    workers: int,
    progress: Progress,
    lock: Lock,
) -> dict[str, Any]:
    manifest = _begin(source, out, packing)
    done = 0
    for number, name in enumerate(names):
        record = manifest["shards"].get(name)
        kept = (out / name).is_file() and record is not None and sha256(out / name) == record["sha256"]
        if record is None or not kept or record["left_out"]:  # what was left out may be mended by now
            manifest["shards"].pop(name, None)
            continue
        done += len(_ids(number, packing, len(source)))
        progress(done)
    remove_unfinished(out, "shard-*", MANIFEST)
    missing = [number for number, name in enumerate(names) if name not in manifest["shards"]]
    manifest["complete"] = not missing
    for number, record in zip(missing, in_workers(_Shards(source, out, packing, names, missing), workers), strict=True):
        manifest["shards"] = dict(sorted([*manifest["shards"].items(), (names[number], record)]))
        lock.check()
        _save(out, manifest)
        done += len(_ids(number, packing, len(source)))
        progress(done)
    if not any(record["images"] for record in manifest["shards"].values()):
        first = manifest["shards"][names[0]]["left_out"][0][1]
        raise DataError(f"none of the {len(source)} images of {source.name} can be read (first: {first})")
    manifest["complete"] = True
    _save(out, manifest)
    load_index([out / name for name in names])  # written beside the shards, so that the first training need not
    return manifest


def _begin(source: Source, out: Path, packing: Packing) -> dict[str, Any]:
    """The manifest in `out`, if it has the same packing and source; a new one if `out` is empty."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(source)):
        digest.update(source.describe(i).encode() + b"\0")
    wanted = {"version": VERSION, "source": source.name, "images": len(source), "names": digest.hexdigest()}
    wanted |= {"packing": asdict(packing), "classes": None if source.class_names is None else [*source.class_names]}
    found = read_manifest(out)
    if not found:
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise DataError(f"{show(out)} is not empty and holds no pack: choose a new folder to pack into")
        found = {**wanted, "shards": {}, "complete": False}
        _save(out, found)  # before the first shard: a folder with shards alone would be taken for somebody else's
        return found
    for key, value in wanted.items():
        if found.get(key) != value:
            what = "other images" if key in ("names", "images", "source", "classes") else f"another {key}"
            raise DataError(f"{show(out)} holds a pack of {what}: choose a new folder, or delete that one")
    return found


def _save(out: Path, manifest: dict[str, Any]) -> None:
    write_atomically(out / MANIFEST, json.dumps(checked(manifest), indent=1).encode(), DISK_FULL)


def _ids(number: int, packing: Packing, images: int) -> range:
    return range(number * packing.per_shard, min((number + 1) * packing.per_shard, images))


class _Shards(Dataset[dict[str, Any] | UserError]):
    """An item is a missing shard: `__getitem__` writes it, in a worker process, and returns its record."""

    def __init__(self, source: Source, out: Path, packing: Packing, names: list[str], missing: list[int]) -> None:
        self.source, self.out, self.packing = source, out, packing
        self.names, self.missing = names, missing
        self.pairs = _pairs(source) if missing else None

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, item: int) -> dict[str, Any] | UserError:
        number = self.missing[item]
        path = self.out / self.names[number]
        left_out: list[tuple[str, str]] = []
        try:
            with atomic_file(path, DISK_FULL) as file:
                images = self._write(file, number, left_out)
        except UserError as error:
            return error
        stamp = stamp_of(path)
        record = {"images": images, "bytes": stamp[0], "sha256": sha256(path), "left_out": left_out}
        return record | {"index": scan(path, stamp).fingerprint}

    def _write(self, file: BinaryIO, number: int, left_out: list[tuple[str, str]]) -> int:
        images = 0
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i in _ids(number, self.packing, len(self.source)):
                try:
                    data, suffix = packed(self.source.read(i), self.packing)
                except (UnreadableImage, OSError) as error:
                    left_out.append((self.source.describe(i), reason(error)))
                    continue
                about: dict[str, Any] = {"path": self.source.describe(i), "crc32": zlib.crc32(data)}
                if self.pairs is not None:
                    first, last = np.searchsorted(self.pairs[:, 0], [i, i + 1])
                    about["classes"] = self.pairs[first:last, 1].tolist()
                _add(tar, f"{i:09d}.{suffix}", data)
                _add(tar, f"{i:09d}.json", json.dumps(about).encode())
                images += 1
        return images


def _pairs(source: Source) -> np.ndarray | None:
    """(image, class) of every label, sorted by image."""
    if isinstance(source, FileSource):  # its matrix may be larger than the memory
        pairs = source.pairs
    else:
        pairs = None if source.labels is None else source.labels.nonzero().numpy()
    return None if pairs is None else pairs[np.lexsort(pairs.T[::-1])]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without times and owners, so that packing again gives the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def packed(data: bytes | UInt8[Tensor, "3 height width"], packing: Packing) -> tuple[bytes, str]:
    """The bytes of an image for the shard, and their suffix. All pixels are decoded, so that a pack holds no image that
    training would have to replace."""
    image = Encoded(data)
    short = min(image.height, image.width)
    if packing.short_side is not None and short > packing.short_side:
        scale = packing.short_side / short
        pixels = image.pixels(image.factor(1 / scale / SPARE))
        size = (round(image.height * scale), round(image.width * scale))
        smaller = interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
        return _encode(smaller, "JPEG", quality=packing.quality), "jpg"
    pixels = image.pixels()
    if isinstance(data, Tensor):
        return _encode(pixels, "PNG"), "png"
    return data, SUFFIXES[image.header.format or ""]


def _encode(pixels: UInt8[Tensor, "3 height width"], kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(stream, kind, **options)
    return stream.getvalue()
