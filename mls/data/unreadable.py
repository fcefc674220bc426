"""The one policy for image files that cannot be read, in every command: each is named, the others are used, too many
are an error. Pretraining puts another image in their place (crops.py), all others leave them out."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mls.data import Source
from mls.data.decode import Encoded, UnreadableImage, decode
from mls.data.loader import cores, in_workers
from mls.data.sources import hash_of_images
from mls.errors import DataError, reason
from mls.files import cache_folder, write_atomically
from mls.locks import locked
from mls.progress import counting

MOST = 0.01  # share of the images that may be broken, unless the configuration says another
CHUNK = 64  # images that a worker looks at before it reports


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Unreadable:
    """Images of one set that cannot be read: `found` has the reason of each, by its number. `key` raises the limit."""

    def __init__(
        self,
        of: int,
        most: float = MOST,
        say: Callable[[str], None] = say,
        file: Path | None = None,
        key: str = "",
    ) -> None:
        self.of, self.most, self.say, self.file, self.key = of, most, say, file, key
        self.found: dict[int, str] = {}

    def note(self, images: Iterable[tuple[int, str]]) -> None:
        """Some of them, each with a sentence that names it. One of few images is not yet too many."""
        for image, words in images:
            if image in self.found:
                continue
            self.found[image] = words
            if self.file is not None:
                with open(self.file, "a", errors="surrogateescape") as file:
                    file.write(words + "\n")
            self.say(f"skipped an image that cannot be read: {words}")
        where = f"listed in {self.file}" if self.file is not None else "`mls data check` lists them"
        if self.found and len(self.found) == self.of:
            raise DataError(f"none of the images can be read, of which there are {self.of} ({where}): repair them")
        if len(self.found) > self.limit:
            more = f", or raise {self.key}" if self.key else ""
            raise DataError(f"{len(self.found)} of {self.of} images cannot be read ({where}): repair them{more}")

    def others(self, images: Sequence[int]) -> list[int]:
        """The places in `images` of those that can be read."""
        return [place for place, image in enumerate(images) if image not in self.found]

    @property
    def limit(self) -> float:
        return max(1.0, self.most * self.of) if self.most else 0.0


def reason_of(source: Source, image: int) -> str | None:
    """Why an image cannot be read; None where it can. It is decoded as small as its format allows."""
    try:
        encoded = Encoded(source.read(image))
        encoded.pixels(encoded.factor(8))
    except (UnreadableImage, OSError) as error:
        return f"{source.describe(image)}: {reason(error)}"
    return None


def unreadable_in(source: Source, images: Sequence[int], quiet: bool = False) -> list[tuple[int, str]]:
    """Those of `images` that cannot be read. Looked at once; the answer is kept in $MLS_CACHE under the images' names,
    sizes and sampled content."""
    digest = hashlib.sha256(hash_of_images(source).encode() + repr(list(images)).encode()).hexdigest()[:16]
    file = cache_folder("readable") / f"{digest}.json"
    with locked(file.with_suffix(".lock"), f"the images of {source.name} are being looked at", wait=True):
        if file.is_file():
            before = [image for image, _ in json.loads(file.read_bytes())]  # repaired meanwhile?
            return [(image, words) for image in before if (words := reason_of(source, image)) is not None]
        found, workers = list[tuple[int, str]](), cores() if len(images) > CHUNK else 0
        with counting(f"reading {source.name} once", len(images), not quiet) as progress:
            for number, part in enumerate(in_workers(_Chunks(source, images), workers), start=1):
                found += part
                progress(min(CHUNK * number, len(images)))
        write_atomically(file, json.dumps(found).encode())
    return found


def readable(
    source: Source, images: Sequence[int], most: float = MOST, key: str = "", quiet: bool = False
) -> list[int]:
    """The places in `images` of those that can be read; the others are named."""
    unreadable = Unreadable(len(images), most, key=key)
    unreadable.note(unreadable_in(source, images, quiet))
    return unreadable.others(images)


def decoded(source: Source, images: Sequence[int], unreadable: Unreadable) -> dict[int, UInt8[Tensor, "3 _ _"]]:
    """Those of `images` that can be read, by number; the others are noted."""
    found = {}
    for image in images:
        try:
            found[image] = decode(source.read(image))
        except (UnreadableImage, OSError) as error:
            unreadable.note([(image, f"{source.describe(image)}: {reason(error)}")])
    return found


class _Chunks(Dataset[list[tuple[int, str]]]):
    def __init__(self, source: Source, images: Sequence[int]) -> None:
        self.source, self.images = source, images

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[int, str]]:
        part = self.images[chunk * CHUNK : (chunk + 1) * CHUNK]
        return [(image, words) for image in part if (words := reason_of(self.source, image)) is not None]
