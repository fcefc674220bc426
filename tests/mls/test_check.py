"""What `mls data check` finds, on one file of every kind; and hostile sets of files from end to end."""

import io
import json
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from mls.config import AugmentConfig, DataConfig
from mls.data.check import KINDS, LARGE, SHARDS, UNREADABLE, check, inspect
from mls.data.crops import CropDataset
from mls.data.decode import UnreadableImage, decode
from mls.data.sources import build_source
from mls.errors import DataError

PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((64, 48))
Command = Callable[..., subprocess.CompletedProcess[str]]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def zoo() -> dict[str, tuple[bytes, set[str]]]:
    """Files by name, each with the kinds that it is of."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    palette = PHOTO.quantize(16)
    jpeg, png = encoded(PHOTO, "JPEG"), encoded(PHOTO, "PNG")
    frames = {"save_all": True, "append_images": [Image.new("P", (64, 48))]}
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    return {
        "plain.jpg": (jpeg, set()),
        "plain.png": (png, set()),
        "grey.jpeg": (encoded(PHOTO.convert("L"), "JPEG"), set()),
        "empty.jpg": (b"", {"empty"}),
        "page.jpg": (b"<html>not found</html>", {"no image"}),
        "cut.jpg": (jpeg[: len(jpeg) // 2], {"truncated"}),
        "cut.png": (png[: len(png) // 2], {"truncated"}),
        "bomb.png": (bytes(bomb), {"too large"}),
        "float.tif": (encoded(PHOTO.convert("F"), "TIFF"), {"unreadable"}),
        "print.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG"), {"CMYK"}),
        "deep.png": (encoded(Image.fromarray(grey), "PNG"), {"16-bit"}),
        "palette.png": (encoded(palette, "PNG"), {"palette"}),
        "ghost.png": (encoded(PHOTO.convert("RGBA"), "PNG"), {"transparent"}),
        "film.gif": (encoded(palette, "GIF", **frames), {"palette", "animated"}),
        "turned.jpg": (encoded(PHOTO, "JPEG", exif=exif), {"rotated"}),
        "liar.jpg": (png, {"other suffix"}),
    }


@pytest.mark.parametrize("name", zoo())
def test_every_kind_is_found_and_nothing_else(name: str) -> None:
    data, kinds = zoo()[name]
    found = inspect(data, name)
    assert {kind for kind, _ in found} == kinds
    assert all(detail for _, detail in found)


@pytest.mark.parametrize("name", zoo())
def test_the_loader_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    data, kinds = zoo()[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "zz.jpg").write_bytes(zoo()["plain.jpg"][0])
    source = build_source(DataConfig(root=str(tmp_path)))
    batch = CropDataset(source, AugmentConfig(size=16), seed=0).__getitems__([(1, 0), (1, 1)])
    replaced = bool(kinds & set(UNREADABLE))
    assert replaced == bool(batch.unreadable) == (batch.ids.tolist() == [1, 1])
    assert all("another image takes its place" in KINDS[kind] for kind in kinds & set(UNREADABLE))


def test_every_kind_is_known_to_the_table() -> None:
    kinds = set().union(*(kinds for _, kinds in zoo().values()))
    assert kinds == set(KINDS) - {"large", "ignored", *SHARDS}
    assert [kind for kind, _ in inspect(encoded(Image.new("1", (8000, LARGE // 8000 + 1)), "PNG"), "a.png")] == [
        "large"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_report_counts_all_images(tmp_path: Path, workers: int) -> None:
    for name, (data, _) in zoo().items():
        (tmp_path / name).write_bytes(data)
    for i in range(130):
        (tmp_path / f"more-{i}.jpg").write_bytes(zoo()["plain.jpg"][0])
    calls: list[int] = []
    source = build_source(DataConfig(root=str(tmp_path)))
    report = check(source, workers, calls.append)
    assert report.images == 146 and report.unreadable == 6
    assert report.found["CMYK"] == [(str(tmp_path / "print.jpg"), "CMYK")]
    assert calls == [64, 128, 146]


@given(st.binary(max_size=120), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00"]))
def test_no_bytes_stop_a_check(data: bytes, start: bytes) -> None:
    found = inspect(start + data, "x.jpg")
    try:
        decode(start + data)
    except UnreadableImage:
        assert len(found) == 1 and found[0][0] in UNREADABLE


def test_the_command_prints_a_table_and_json_and_exits_with_2_where_images_are_lost(
    tmp_path: Path, mls_command: Command
) -> None:
    for name, (data, _) in zoo().items():
        (tmp_path / name).write_bytes(data)
    done = mls_command("data", "check", str(tmp_path), "--workers", "0", COLUMNS="160")
    assert done.returncode == 2
    assert done.stderr == "error: 6 of 16 images cannot be read: repair or remove them\n"
    assert all(kind in done.stdout for kind in set(KINDS) - {"large", "ignored", *SHARDS})
    for name, (_, kinds) in zoo().items():
        if kinds & set(UNREADABLE):
            (tmp_path / name).unlink()
    done = mls_command("data", "check", str(tmp_path), "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["unreadable"]) == (10, 0)
    assert found["found"]["rotated"] == [[str(tmp_path / "turned.jpg"), "orientation 6"]]


# ---------------------------------------------------------------- hostile sets


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    data, _ = zoo()["bomb.png"]
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_ten_thousand_files_in_one_folder_with_foreign_names_make_an_epoch(tmp_path: Path) -> None:
    data = encoded(PHOTO.resize((8, 8)), "JPEG")
    top = str(tmp_path).encode()
    for i in range(10_000):
        with open(top + b"/\xff\xfe%05d.jpg" % i, "wb") as file:
            file.write(data)
    source = build_source(DataConfig(root=str(tmp_path)))
    assert len(source) == 10_000
    ids = source.order(0, 1)[:64]
    batch = CropDataset(source, AugmentConfig(size=8), seed=0).__getitems__([(1, int(i)) for i in ids])
    assert batch.ids.tolist() == ids.tolist() and not batch.unreadable
    assert source.describe(9_999).endswith(r"\xff\xfe09999.jpg")


def test_an_archive_is_never_extracted(tmp_path: Path) -> None:
    inside = tmp_path / "data"
    inside.mkdir()
    with zipfile.ZipFile(inside / "evil.zip", "w") as archive:
        archive.writestr("../../escaped.jpg", encoded(PHOTO, "JPEG"))
    with tarfile.open(inside / "evil.tar", "w") as tar:
        member = tarfile.TarInfo("../../escaped.jpg")
        member.size = len(data := encoded(PHOTO, "JPEG"))
        tar.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match=r"evil\.zip is a file where a folder of images was expected"):
        build_source(DataConfig(root=str(inside / "evil.zip")))
    made = build_source(DataConfig(root=str(inside / "evil.tar")))
    assert check(made).found == {}
    assert not list(tmp_path.rglob("escaped.jpg")) and not (tmp_path.parent / "escaped.jpg").exists()
