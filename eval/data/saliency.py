"""Images in which the salient object is marked: ECSSD, DUTS and DUT-OMRON, for judging masks that nobody taught."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.regions import RegionImages, listed_regions

HALF = 128  # a pixel is salient from this grey on: masks have soft edges
VALUES = (tuple(range(HALF)), tuple(range(HALF, 256)))
CLASSES = ["background", "salient"]


def split(folder: Path, name: str, images: str, masks: str) -> RegionImages:
    inside = folder / images
    files = sorted(path.name for path in inside.iterdir() if path.suffix == ".jpg")
    if not files:
        raise DataError(f"{inside} has no images (*.jpg): unpack the archive of the images there")
    labels = [folder / masks / f"{Path(file).stem}.png" for file in files]
    paths = [f"{images}/{file}" for file in files]
    return listed_regions(name, folder, paths, labels, CLASSES, inside, values=VALUES, void=(), grey=True)


def read(folder: Path, name: str, images: str, masks: str) -> DataSet[RegionImages]:
    """Of a set without training images: train is test."""
    found = split(folder, name, images, masks)
    return DataSet(name, found, found)


def read_duts(folder: Path) -> DataSet[RegionImages]:
    """`DUTS-TR/DUTS-TR-Image`, `DUTS-TR/DUTS-TR-Mask`, and the same with TE."""
    train, test = (split(folder, f"duts {one}", f"DUTS-{one}/DUTS-{one}-Image", f"DUTS-{one}/DUTS-{one}-Mask")
                   for one in ("TR", "TE"))  # fmt: skip
    return DataSet("duts", train, test)


def _layout(folder: str, images: str, masks: str, archives: str, count: int) -> Layout:
    reader = partial(read, name=folder.lower().replace("-", "_"), images=images, masks=masks)
    sizes = {"classes": 2, "train": count, "test": count}
    return Layout(reader, folder, f"download {archives}, unpack into $MLS_DATA/{folder}", sizes, test_only=True)


CUHK, DLUT = "www.cse.cuhk.edu.hk/leojia/projects/hsaliency", "saliencydetection.net"
ECSSD = ("ECSSD", "images", "ground_truth_mask", f"images.zip and ground_truth_mask.zip from {CUHK}", 1000)
OMRON = ("DUT-OMRON-image.zip and DUT-OMRON-gt-pixelwise.zip.zip from", f"{DLUT}/dut-omron")
register("ecssd", _layout(*ECSSD))
register("dut_omron", _layout("DUT-OMRON", "DUT-OMRON-image", "pixelwiseGT-new-PNG", " ".join(OMRON), 5168))
register(
    "duts",
    Layout(
        read_duts,
        "DUTS",
        f"download DUTS-TR.zip and DUTS-TE.zip from {DLUT}/duts and unpack both into $MLS_DATA/DUTS",
        {"classes": 2, "train": 10553, "test": 5019},
    ),
)
