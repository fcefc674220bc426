"""The measuring command itself; what it measures is no test's business, since it depends on the machine."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mls.tools.bench import peers, rows
from mls.tools.bench.input import _kept, psnr_of_scaled_decoding, write_photographs

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.long
def test_the_yardstick_and_ours_are_measured_on_the_same_files(mls_command: Command, tmp_path: Path) -> None:
    kept = tmp_path / "input.json"
    few = ("--count", "4", "--rounds", "1", "--no-step")
    done = mls_command("bench", "input", *few, "--out", str(kept), COLUMNS="120")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"│ (\S.*?) +│ +(-?[\d.]+)", done.stdout))  # a difference may be negative
    assert {"MoCo's pipeline", "torchvision v2", "ours", "ours, packed with --short-side 320"} <= set(rows)
    assert {"ours, engine.augment=device", "decoding alone", "augmentation", "boxes, EXIF"} <= set(rows)
    assert {"reading and headers", "decoding", "cutting two crops", "1/2", "1/4", "1/8", "Pillow"} <= set(rows)
    seconds = {row["row"]: row["seconds an image"] for row in json.loads(kept.read_text())["rows"]}
    assert seconds["decoding alone"] < seconds["ours, two normalised views"]
    for ends_with in ("normalised views", "uint8 crops"):
        assert f"two {ends_with}: 4 images, 640 × 480, quality 90" in done.stdout
    assert re.findall(r"│ ours +│ \d+ +│ ([\d.]+)", done.stdout) == ["1.00", "1.00"]


def test_each_row_stands_beside_ours_and_what_is_not_installed_is_told() -> None:
    others = {(peers.MOCO, rows.VIEWS): 3.0, (peers.ALBUMENTATIONS, rows.CROPS): 1.0, rows.DECODE: 0.5}
    found = _kept([{(rows.OURS, rows.VIEWS): 2.0, (rows.OURS, rows.CROPS): 1.0, **others}] * 3)
    ratios = {row["row"]: row.get("time, ours = 1") for row in found if "note" not in row}
    assert ratios == {
        "ours, two normalised views": 1, "ours, two uint8 crops": 1, "MoCo's pipeline, two normalised views": 1.5,
        "albumentations, two uint8 crops": 1, "decoding alone": 0.25,
    }  # fmt: skip
    missing = [row["row"] for row in found if row.get("note") == "not installed"]
    assert missing == [f"{name}, two normalised views" for name in ("lightly", "albumentations", "DALI")] + [
        "DALI, two uint8 crops"
    ]


def test_the_photographs_are_real_and_of_the_stated_size(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs", 6, (640, 480))
    images = [Image.open(file) for file in sorted(folder.iterdir())]
    assert [image.size for image in images] == [(640, 480)] * 6
    assert len({image.tobytes() for image in images}) == 6
    assert all(len(image.getcolors(1 << 20) or []) > 5_000 for image in images)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_more_pixels_to_spare_bring_crops_nearer_to_full_decoding(factor: int) -> None:
    mean = [sum(psnr_of_scaled_decoding(factor, spare, tries=8)) / 16 for spare in (1.0, 1.5, 3.0)]
    assert mean == sorted(mean) and mean[2] > mean[0] + 5
