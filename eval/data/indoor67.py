"""MIT Indoor scenes (Quattoni & Torralba 2009): 67 kinds of rooms, the published 80 + 20 images of each."""

from __future__ import annotations

from pathlib import Path

from mls.data.listing import printable
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.one_class import by_folder, first_folders, lines, listed


def read(folder: Path) -> DataSet:
    """`TrainImages.txt` and `TestImages.txt` (paths such as `gameroom/bt_132294.jpg`) beside `Images`."""
    file = folder / "TrainImages.txt"
    classes = first_folders(lines(file))

    def split(phase: str, file: Path) -> LabelledImages:
        paths = lines(file)
        truth = by_folder(paths, classes, file)
        return listed(f"indoor67 {phase}", folder / "Images", paths, truth, [printable(one) for one in classes], file)

    return DataSet("indoor67", split("train", file), split("test", folder / "TestImages.txt"))


DOWNLOAD = (
    "download TrainImages.txt, TestImages.txt and indoorCVPR_09.tar from web.mit.edu/torralba/www/indoor.html "
    "into $MLS_DATA/indoorCVPR_09 and unpack the archive there, which gives Images"
)
register("indoor67", Layout(read, "indoorCVPR_09", DOWNLOAD, {"classes": 67, "train": 5360, "test": 1340}))
