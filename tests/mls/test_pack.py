"""Packing: what comes out can be read by every tar source, is the same after a kill, and holds no image that fails."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from sklearn.datasets import load_sample_image

from mls.config import DataConfig, ScenesConfig
from mls.data import Source
from mls.data.decode import decode
from mls.data.pack import Packing, pack
from mls.data.sources import build_source
from mls.data.tar import TarSource
from mls.errors import DataError
from mls.tools.bench.faults.commands import Command

PHOTO = Image.fromarray(load_sample_image("china.jpg"))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def put(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def photographs(root: Path, count: int = 7) -> Source:
    """In two class folders, with their own sizes."""
    for i in range(count):
        put(root / f"{'ab'[i % 2]}/{i}.jpg", encoded(PHOTO.crop((i, 0, 200 + 9 * i, 160))))
    return build_source(DataConfig(root=str(root)))


def opened(folder: Path) -> TarSource:
    made = build_source(DataConfig(root=str(folder)))
    assert isinstance(made, TarSource)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_gives_back_the_files_the_labels_and_the_class_names(tmp_path: Path, workers: int) -> None:
    source = photographs(tmp_path / "images")
    pack(source, tmp_path / "packed", Packing(per_shard=3), workers)
    made = opened(tmp_path / "packed")
    assert sorted(contents(tmp_path / "packed")) == ["manifest.json", *(f"shard-{n:06d}.tar" for n in range(3))]
    assert [made.read(i) for i in range(7)] == [source.read(i) for i in range(7)]
    assert made.class_names == ["a", "b"]
    assert torch.equal(made.labels, source.labels)


def test_several_labels_an_image_or_none_survive(tmp_path: Path) -> None:
    scenes = build_source(DataConfig(source="scenes", scenes=ScenesConfig(count=20, test_count=8)))
    pack(scenes, tmp_path / "packed", Packing(per_shard=8))
    made = opened(tmp_path / "packed")
    assert torch.equal(made.labels, scenes.labels)
    assert made.labels.sum(dim=1).max() > 1
    assert list(made.class_names) == list(scenes.class_names)
    assert all(torch.equal(decode(made.read(i)), decode(scenes.read(i))) for i in range(20))


def test_large_images_are_scaled_down_upright_and_small_ones_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(PHOTO, exif=exif, quality=95)
    put(tmp_path / "images/large.jpg", turned)
    put(tmp_path / "images/small.jpg", encoded(PHOTO.resize((120, 100))))
    put(tmp_path / "images/named.jpg", encoded(PHOTO.resize((50, 40)), "PNG"))
    source = build_source(DataConfig(root=str(tmp_path / "images")))
    pack(source, tmp_path / "packed", Packing(short_side=100))
    made = opened(tmp_path / "packed")
    assert [made.describe(i)[-3:] for i in range(3)] == ["jpg", "png", "jpg"]
    small = decode(made.read(0)).float()
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).resize((100, 150), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert small.shape == (3, 150, 100)
    assert (small - expected).abs().mean() < 5
    assert [made.read(i) for i in (1, 2)] == [source.read(i) for i in (1, 2)]


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path: Path) -> None:
    photographs(tmp_path / "images")
    put(tmp_path / "images/a/2.jpg", b"no image")
    source = build_source(DataConfig(root=str(tmp_path / "images")))
    manifest = pack(source, tmp_path / "packed", Packing(per_shard=4))
    left_out = [note for shard in manifest["shards"].values() for note in shard["left_out"]]
    assert [image for image, _ in left_out] == [str(tmp_path / "images/a/2.jpg")]
    made = opened(tmp_path / "packed")
    assert len(made) == 6
    assert made.labels.sum(dim=0).tolist() == [3, 3]
    before = (tmp_path / "packed/shard-000001.tar").stat().st_mtime_ns
    put(tmp_path / "images/a/2.jpg", encoded(PHOTO))  # mended
    assert pack(source, tmp_path / "packed", Packing(per_shard=4))["complete"]
    assert len(opened(tmp_path / "packed")) == 7
    assert (tmp_path / "packed/shard-000001.tar").stat().st_mtime_ns == before, "a whole shard is kept"
    for i in range(7):
        put(tmp_path / f"broken/{i}.jpg", b"no image")
    with pytest.raises(DataError, match=r"none of the 7 images of folder:broken can be read \(first: not an image"):
        pack(build_source(DataConfig(root=str(tmp_path / "broken"))), tmp_path / "nothing", Packing())


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_an_avif_is_packed_as_it_is(tmp_path: Path) -> None:
    put(tmp_path / "images/0.avif", encoded(PHOTO.crop((0, 0, 64, 48)), "AVIF"))
    pack(build_source(DataConfig(root=str(tmp_path / "images"))), tmp_path / "packed", Packing())
    assert opened(tmp_path / "packed").read(0) == (tmp_path / "images/0.avif").read_bytes()


def test_a_killed_pack_goes_on_and_ends_as_one_that_never_stopped(
    tmp_path: Path, mls_started: Callable[..., list[Command]], mls_command: Callable[..., subprocess.CompletedProcess]
) -> None:
    for i in range(160):
        put(tmp_path / f"images/{i:03}.jpg", encoded(PHOTO.crop((i, 0, 500 + i, 400))))
    source = build_source(DataConfig(root=str(tmp_path / "images")))
    pack(source, tmp_path / "whole", Packing(short_side=64, per_shard=2))
    arguments = ["data", "pack", str(tmp_path / "images"), str(tmp_path / "killed"), "--short-side", "64"]
    arguments += ["--per-shard", "2", "--workers", "1"]
    (running,) = mls_started(*arguments)
    while not (tmp_path / "killed/shard-000003.tar").exists() and running.running:
        time.sleep(0.005)
    running.send(signal.SIGKILL)
    assert running.code() == -signal.SIGKILL
    done = [name for name in contents(tmp_path / "killed") if name.endswith(".tar")]
    assert 0 < len(done) < 80
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in done}
    with open(tmp_path / "killed/shard-000001.tar", "r+b") as shard:  # as a failing disk would
        shard.seek(700)
        shard.write(b"rot")
    with pytest.raises(DataError, match=r"the pack in .*killed is not finished: run its `mls data pack` again"):
        opened(tmp_path / "killed")
    again = mls_command(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("160 images in 80 shards")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp")) and not list((tmp_path / "killed").glob(".shard*"))
    assert (tmp_path / "killed/shard-000000.tar").stat().st_mtime_ns == times["shard-000000.tar"], "it was made again"


def test_another_packing_or_a_full_folder_is_refused(tmp_path: Path) -> None:
    source = photographs(tmp_path / "images")
    pack(source, tmp_path / "packed", Packing(short_side=100))
    before = contents(tmp_path / "packed")
    with pytest.raises(DataError, match=r"packed holds a pack of another packing: choose a new folder"):
        pack(source, tmp_path / "packed", Packing(short_side=90))
    put(tmp_path / "images/a/9.jpg", encoded(PHOTO))
    with pytest.raises(DataError, match=r"packed holds a pack of other images: choose a new folder"):
        pack(build_source(DataConfig(root=str(tmp_path / "images"))), tmp_path / "packed", Packing(short_side=100))
    with pytest.raises(DataError, match=r"images is not empty and holds no pack: choose a new folder"):
        pack(source, tmp_path / "images", Packing())
    assert contents(tmp_path / "packed") == before


def test_members_carry_no_names_of_the_packed_files_in_their_own(tmp_path: Path) -> None:
    """So that no name, however hostile, can lead a program that extracts shards anywhere."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"caf\xe9.jpg", b"a\nb.jpg"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(encoded(PHOTO.resize((9, 9))))
    pack(build_source(DataConfig(root=str(folder))), tmp_path / "packed", Packing())
    with tarfile.open(tmp_path / "packed/shard-000000.tar") as tar:
        assert tar.getnames() == [f"{i:09d}.{suffix}" for i in range(2) for suffix in ("jpg", "json")]
        about = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith("json")]
    assert about[1]["path"].endswith(r"caf\xe9.jpg")


def test_a_shard_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    photographs(tmp_path / "images")
    limited = f"ulimit -f 20; exec {sys.executable} -m mls.tools data pack images packed"
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: cannot write packed/shard-000000.tar: File too large")
    assert not list((tmp_path / "packed").glob("*.tar"))
