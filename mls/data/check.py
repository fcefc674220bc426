"""`mls data check`: unreadable and unusual files of a source, and what the loader does with each kind. Nothing is
changed; decoding is in decode.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mls.data import Source, truth
from mls.data.decode import MPO, Encoded, UnreadableImage
from mls.data.formats import missed
from mls.data.listing import printable
from mls.data.loader import in_workers
from mls.data.tar import TarSource
from mls.errors import reason

REPLACED = "another image takes its place, and the run lists it in unreadable.txt"
KINDS = {  # kind of file: what the loader does with it
    "empty": REPLACED,
    "no image": REPLACED,
    "truncated": REPLACED,
    "too large": f"refused before memory is spent; {REPLACED}",
    "unreadable": REPLACED,
    "large": "decoded, at the cost of much memory: `mls data pack --short-side` makes it small",
    "CMYK": "converted to RGB by Pillow",
    "16-bit": "the upper 8 bits are kept",
    "palette": "its colours are looked up",
    "transparent": "transparency is dropped",
    "animated": "the first frame is used",
    "rotated": "turned upright by its EXIF orientation",
    "other suffix": "decoded as what it is, whatever its name says",
    "ignored": "a format that is not read",
    "damaged shard": "the images that can be found are used, with a warning",
    "changed shard": f"of an image that is not as it was packed: {REPLACED}",
}
SHARDS = ("damaged shard", "changed shard")
TRUTH = {**truth.KINDS, "another size": "training ends there", "unknown labels": "training ends there"}
UNREADABLE = ("empty", "no image", "truncated", "too large", "unreadable")
LARGE = 50_000_000  # pixels: 150 MB in memory, in every worker
CHUNK = 64  # images that a worker inspects before it reports
SUFFIXES = {
    "JPEG": ("jpg", "jpeg"),
    MPO: ("jpg", "jpeg"),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm"),
    "HEIF": ("heic", "heif"),
}

Progress = Callable[[int], None]  # images done


@dataclass
class Report:
    """For every kind the (image, detail) pairs in which it was found."""

    images: int
    found: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def unreadable(self) -> int:
        return sum(len(self.found.get(kind, ())) for kind in UNREADABLE)

    @property
    def shards(self) -> int:
        return sum(len(self.found.get(kind, ())) for kind in SHARDS)

    @property
    def odd_truth(self) -> int:
        fine = (*truth.AS_DETECTRON2, *truth.PART_OF)
        return sum(len(self.found.get(kind, ())) for kind in TRUTH if kind not in fine)

    def add(self, other: Report) -> None:
        """Of another part of the data set."""
        self.images += other.images
        for kind, entries in other.found.items():
            self.found.setdefault(kind, []).extend(entries)


def check(
    source: Source,
    workers: int = 0,
    progress: Progress = lambda done: None,
    annotated: Callable[[int, tuple[int, int]], list[tuple[str, str]]] = lambda row, size: [],
) -> Report:
    """Decode every image once, and read every shard. `annotated` gives the kinds of TRUTH that an image of this height
    and width is of."""
    report = Report(len(source))
    done = 0
    for kind, entries in (odd.found if (odd := getattr(source, "odd", None)) else {}).items():
        report.found.setdefault(kind, []).extend(entries)
    for path in getattr(source, "ignored", ()):
        report.found.setdefault("ignored", []).append((printable(path), missed([path]).partition("(")[2].rstrip(")")))
    for findings in in_workers(_Chunks(source, annotated), workers):
        for kind, image, detail in findings:
            report.found.setdefault(kind, []).append((image, detail))
        done = min(done + CHUNK, len(source))
        progress(done)
    for kind, shard, detail in source.odd_shards() if isinstance(source, TarSource) else ():
        report.found.setdefault(kind, []).append((shard, detail))
    return report


class _Chunks(Dataset[list[tuple[str, str, str]]]):
    """An item is the list of (kind, image, detail) found in CHUNK images."""

    def __init__(self, source: Source, annotated: Callable[[int, tuple[int, int]], list[tuple[str, str]]]) -> None:
        self.source, self.annotated = source, annotated

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[str, str, str]]:
        found = []
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.source))):
            name = self.source.describe(i)
            try:
                data = self.source.read(i)
                findings = inspect(data, name)
                if isinstance(data, bytes) and not any(kind in UNREADABLE for kind, _ in findings):
                    image = Encoded(data)
                    findings += self.annotated(i, (image.height, image.width))
            except OSError as error:
                findings = [("unreadable", reason(error))]
            found += [(kind, name, detail) for kind, detail in findings]
        return found


def inspect(data: bytes | UInt8[Tensor, "3 height width"], name: str) -> list[tuple[str, str]]:
    """The kinds of one image, each with a detail.

    >>> inspect(b"", "a.jpg")
    [('empty', 'the file is empty')]
    """
    if isinstance(data, Tensor):
        return []
    try:
        image = Encoded(data)
        found = _of_header(image, name)
        image.pixels()
    except UnreadableImage as error:
        return [(_kind_of_error(str(error)), str(error))]
    return found


def _of_header(image: Encoded, name: str) -> list[tuple[str, str]]:
    header, size = image.header, f"{image.width} × {image.height}"
    kind, mode = header.format or "", header.mode
    suffix = os.path.splitext(name)[1].lower().removeprefix(".")
    details = {
        "large": size if image.width * image.height > LARGE else "",
        "CMYK": mode if mode in ("CMYK", "YCCK", "LAB", "YCbCr") else "",
        "16-bit": mode if mode.startswith("I") or _is_deep_colour(image) else "",
        "palette": mode if mode in ("P", "PA") else "",
        "transparent": mode if mode in ("LA", "RGBA", "PA") or "transparency" in header.info else "",
        "animated": f"{frames} frames" if kind != MPO and (frames := getattr(header, "n_frames", 1)) > 1 else "",
        "rotated": f"orientation {image.orientation}" if image.orientation != 1 else "",
        "other suffix": f"it is a {kind}" if suffix not in SUFFIXES.get(kind, (kind.lower(),)) else "",
    }
    return [(kind, detail) for kind, detail in details.items() if detail]


def _is_deep_colour(image: Encoded) -> bool:
    """A PNG with 16 bits per channel, which Pillow opens as 8-bit RGB: byte 24 of the file is its bit depth."""
    return image.header.format == "PNG" and isinstance(image.data, bytes) and image.data[24] == 16


def _kind_of_error(message: str) -> str:
    text = message.lower()
    for kind, words in {
        "empty": ("is empty",),
        "no image": ("not an image",),
        "too large": ("exceeds limit", "decompression bomb"),
        "truncated": ("truncated", "premature end", "unexpected end", "eof"),
    }.items():
        if any(word in text for word in words):
            return kind
    return "unreadable"
