"""Damaged tar shards: never are fewer or other images read without a word, and `mls data check` always finds it."""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mls.tools.bench.faults import fault

IMAGES, PER_SHARD = 30, 10

Damage = Callable[[Path, random.Random], None]  # what happens to a shard


def zeroed_header(shard: Path, draw: random.Random) -> None:
    with tarfile.open(shard) as tar:
        place = draw.choice([member.offset for member in tar])
    overwrite(shard, place, bytes(512))


def truncated(shard: Path, draw: random.Random) -> None:
    os.truncate(shard, draw.randrange(shard.stat().st_size))


def zeroed_tail(shard: Path, draw: random.Random) -> None:
    """As after a loss of power: the length is right, what was not yet written is zeros."""
    size = shard.stat().st_size
    truncated(shard, draw)
    os.truncate(shard, size)


def flipped(shard: Path, draw: random.Random) -> None:
    content = bytearray(shard.read_bytes())
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    shard.write_bytes(content)


def flipped_pixels(shard: Path, draw: random.Random) -> None:
    with tarfile.open(shard) as tar:
        member = draw.choice([member for member in tar if member.name.endswith("jpg")])
    place = member.offset_data + draw.randrange(member.size)
    overwrite(shard, place, bytes([shard.read_bytes()[place] ^ 1 << draw.randrange(8)]))


def overwrite(file: Path, place: int, content: bytes) -> None:
    with open(file, "r+b") as opened:
        opened.seek(place)
        opened.write(content)


def one_shard(folder: Path, number: int, damages: tuple[Damage, ...], packed: bool) -> str:
    """Damage to a shard, before it was ever read or afterwards, with a new time on the file or as by a failing disk."""
    draw = random.Random(number)
    copy_of_pack(folder, packed)
    shard = folder / f"shard-{draw.randrange(IMAGES // PER_SHARD):06d}.tar"
    time = shard.stat().st_mtime_ns
    if read_before := draw.random() < 0.5:
        silently(folder, packed)
    draw.choice(damages)(shard, draw)
    if read_before and draw.random() < 0.5:
        os.utime(shard, ns=(time, time))
    return silently(folder, packed)


@fault("a header of a packed shard overwritten with zeros", tries=200, quick=3)
def header_of_pack(folder: Path, number: int) -> str:
    return one_shard(folder, number, (zeroed_header,), packed=True)


@fault("a packed shard cut off, or its end zeros", tries=200, quick=4)
def end_of_pack(folder: Path, number: int) -> str:
    return one_shard(folder, number, (truncated, zeroed_tail), packed=True)


@fault("up to 8 bits of a packed shard flipped", tries=500, quick=8)
def bits_of_pack(folder: Path, number: int) -> str:
    return one_shard(folder, number, (flipped,), packed=True)


@fault("packed shards exchanged, doubled, missing or added", tries=100, quick=4)
def names_of_pack(folder: Path, number: int) -> str:
    draw = random.Random(number)
    copy_of_pack(folder)
    first, second = draw.sample(sorted(folder.glob("*.tar")), 2)
    if draw.random() < 0.5:
        silently(folder)
    if number % 4 == 0:
        for old, new in ((first, folder / "third"), (second, first), (folder / "third", second)):
            old.rename(new)
    elif number % 4 == 1:
        shutil.copy(first, second)
    elif number % 4 == 2:
        first.unlink()
    else:
        shutil.copy(first, folder / "shard-000007.tar")
    return silently(folder)


@fault("manifest.json of a pack flipped, cut off, missing, or another's", tries=300, quick=8)
def manifest(folder: Path, number: int) -> str:
    draw = random.Random(number)
    copy_of_pack(folder)
    file = folder / "manifest.json"
    if number % 4 == 0:
        truncated(file, draw)
    elif number % 40 == 1:
        file.unlink()
    elif number % 40 == 2:
        file.write_text(draw.choice(["null", "5", "[]", "[" * 100_000, '{"name": "of another program"}']))
    else:
        place = draw.randrange(file.stat().st_size)
        overwrite(file, place, bytes([file.read_bytes()[place] ^ 1 << draw.randrange(8)]))
    return silently(folder, labels=file.is_file())


@fault("the index beside the shards flipped or cut off", tries=200, quick=3)
def index(folder: Path, number: int) -> str:
    copy_of_pack(folder)
    silently(folder)
    (file,) = folder.glob(".mls-index-*")
    random.Random(number).choice([flipped, truncated])(file, random.Random(number))
    return silently(folder)


@fault("another program's shard with a header of zeros, or cut off", tries=300, quick=6)
def foreign(folder: Path, number: int) -> str:
    return one_shard(folder, number, (zeroed_header, truncated), packed=False)


NO_COUNT = "up to 11 KiB of zeros end any tar: what they replaced is missed only where it had been counted before"
NO_CHECKSUM = "a JPEG file has no checksum of its own, and other programs' shards bring none: `mls data pack` adds one"


@fault("the end of another program's shard zeros", tries=100, quick=2, reason=NO_COUNT)
def end_of_foreign(folder: Path, number: int) -> str:
    return one_shard(folder, number, (zeroed_tail,), packed=False)


@fault("a bit of an image in another program's shard flipped", tries=50, quick=1, reason=NO_CHECKSUM)
def pixels_of_foreign(folder: Path, number: int) -> str:
    return one_shard(folder, number, (flipped_pixels,), packed=False)


def silently(folder: Path, packed: bool = True, labels: bool = True) -> str:
    """What of a damaged set went unsaid."""
    from mls.config import DataConfig
    from mls.data.check import check
    from mls.data.decode import UnreadableImage, decode
    from mls.data.sources import build_source
    from mls.errors import DataError

    said = logging.getLogger("mls.data.tar")
    warnings = Collected(said)
    try:
        source = build_source(DataConfig(root=str(folder)))
        report = check(source)
    except DataError:
        return ""
    finally:
        said.removeHandler(warnings)
        said.propagate = True
    wanted, _, truth = original()
    if len(source) != IMAGES and not warnings.told:
        return f"{len(source)} of {IMAGES} images without a word"
    if packed and labels and (source.labels is None or not source.labels.equal(truth)):
        return "other labels without a word"
    for number in range(len(source)):
        try:
            decode(found := source.read(number))
        except (OSError, UnreadableImage):  # another takes its place, and it is named
            continue
        if found not in (wanted if warnings.told else wanted[number : number + 1]):
            return "another image without a word"
    changed = any(file.read_bytes() != (original()[1] / file.name).read_bytes() for file in folder.glob("*.tar"))
    found_odd = report.found if packed else report.found or len(source) == IMAGES
    return "`mls data check` finds nothing odd" if changed and not found_odd else ""


class Collected(logging.Handler):
    """What a logger says while something is read."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.told: list[str] = []
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def copy_of_pack(folder: Path, packed: bool = True) -> None:
    for file in original()[1].iterdir():
        if packed or file.suffix == ".tar":
            shutil.copy2(file, folder)


@cache
def original() -> tuple[list[bytes], Path, Any]:
    """Images, the folder of their pack, and their labels."""
    import numpy as np
    from PIL import Image

    from mls.config import DataConfig
    from mls.data.pack import Packing, pack
    from mls.data.sources import build_source

    folder = Path(mkdtemp(prefix="mls-fault-"))
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 4, 3), dtype=np.uint8)
    for number, small in enumerate(pixels):
        file, stream = folder / "images" / f"{number % 3}" / f"{number:02d}.jpg", io.BytesIO()
        Image.fromarray(small).resize((48, 48)).save(stream, "JPEG", quality=95)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(stream.getvalue())
    source = build_source(DataConfig(root=str(folder / "images")))
    pack(source, folder / "packed", Packing(per_shard=PER_SHARD))
    images: list[Any] = [source.read(number) for number in range(IMAGES)]
    return images, folder / "packed", source.labels
