"""COCO 2017 with a class for every pixel (Caesar et al., CVPR 2018): 171 classes, and their super-categories as dense
self-supervised papers use them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mls.data.pictures import VOID
from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.regions import RegionImages, listed_regions

# The numbers of the things' categories, which follow each other within a super-category, and those that no object has.
THINGS = {
    "electronic": (72, 77),
    "appliance": (78, 83),
    "food": (52, 61),
    "furniture": (62, 71),
    "indoor": (84, 91),
    "kitchen": (44, 51),
    "accessory": (26, 33),
    "animal": (16, 25),
    "outdoor": (10, 15),
    "person": (1, 1),
    "sports": (34, 43),
    "vehicle": (2, 9),
}
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
# The stuff's categories; in alphabetical order they have the numbers from 92 on.
STUFF = {
    "ceiling": "ceiling-other ceiling-tile",
    "floor": "carpet floor-marble floor-other floor-stone floor-tile floor-wood",
    "food-stuff": "food-other fruit salad vegetable",
    "furniture-stuff": "cabinet counter cupboard desk-stuff door-stuff furniture-other light mirror-stuff shelf stairs "
    "table",
    "raw-material": "cardboard metal paper plastic",
    "textile": "banner blanket cloth clothes curtain mat napkin pillow rug textile-other towel",
    "wall": "wall-brick wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood",
    "window": "window-blind window-other",
    "building": "bridge building-other house roof skyscraper tent",
    "ground": "dirt gravel ground-other mud pavement platform playingfield railroad road sand snow",
    "plant": "branch bush flower grass leaves moss plant-other straw tree",
    "sky": "clouds sky-other",
    "solid": "hill mountain rock solid-other stone wood",
    "structural": "cage fence net railing structural-other",
    "water": "fog river sea water-other waterdrops",
}
FIRST_STUFF = 92


def categories() -> Iterator[tuple[str, str, int]]:
    """(super-category, name, number) of each of the 171."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    for name, (first, last) in THINGS.items():
        yield from ((name, names[one], one) for one in range(first, last + 1) if one not in UNUSED)
    stuff = {one: name for name, ones in STUFF.items() for one in ones.split()}
    yield from ((stuff[one], one, number) for number, one in enumerate(sorted(stuff), start=FIRST_STUFF))


def classes_of(which: str) -> dict[str, list[int]]:
    """The numbers of each class.

    >>> {which: len(classes_of(which)) for which in ("all", "coarse", "things", "stuff")}
    {'all': 171, 'coarse': 27, 'things': 12, 'stuff': 15}
    """
    if which == "all":
        return {name: [number] for _, name, number in sorted(categories(), key=lambda one: one[2])}
    parts = {"coarse": [*THINGS, *STUFF], "things": [*THINGS], "stuff": [*STUFF]}
    found: dict[str, list[int]] = {name: [] for name in parts[which]}
    for name, _, number in categories():
        if name in found:
            found[name].append(number)
    return found


def read(folder: Path, name: str, which: str) -> DataSet[RegionImages]:
    """`{train,val}2017/*.jpg` and the pixel maps of stuffthingmaps_trainval2017.zip, in which a category's number less
    one stands and 255 for nothing, in `stuffthingmaps/{train,val}2017`; or `images/…` and `annotations/…`."""
    pairs = (("", "stuffthingmaps"), ("", "stuffthingmaps_trainval2017"), ("images", "annotations"))
    images, maps = next((pair for pair in pairs if (folder / pair[1] / "val2017").is_dir()), pairs[0])
    numbers = classes_of(which)
    values = tuple(tuple(number - 1 for number in of) for of in numbers.values())
    others = {number - 1 for _, _, number in categories()} - {number for of in values for number in of}

    def split(phase: str) -> RegionImages:
        inside = folder / images / phase
        stems = sorted(path.stem for path in inside.iterdir() if path.suffix == ".jpg")
        next((folder / maps / phase).iterdir(), None)  # an error where the maps were not unpacked
        if not stems:
            raise DataError(f"{inside} has no images (*.jpg): unpack {phase}.zip there")
        labels = [folder / maps / phase / f"{stem}.png" for stem in stems]
        paths = [str((inside / f"{stem}.jpg").relative_to(folder)) for stem in stems]
        void = (*sorted(others), VOID)
        return listed_regions(f"{name} {phase}", folder, paths, labels, list(numbers), inside, values=values, void=void)

    return DataSet(name, split("train2017"), split("val2017"))


DOWNLOAD = """download train2017.zip and val2017.zip from cocodataset.org and stuffthingmaps_trainval2017.zip from
github.com/nightrome/cocostuff, unpack the images into $MLS_DATA/coco2017 and the maps into its folder stuffthingmaps"""


def _layout(name: str, which: str, classes: int) -> Layout:
    sizes = {"classes": classes, "train": 118287, "test": 5000}
    return Layout(partial(read, name=name, which=which), "coco2017", " ".join(DOWNLOAD.split()), sizes)


register("coco_stuff", _layout("coco_stuff", "stuff", 15))
register("coco_things", _layout("coco_things", "things", 12))
register("coco_stuff27", _layout("coco_stuff27", "coarse", 27))
register("coco_stuff171", _layout("coco_stuff171", "all", 171))
