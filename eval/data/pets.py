"""Oxford-IIIT Pets (Parkhi et al. 2012): 37 breeds of cats and dogs. torchvision's reader gives no paths, only decoded
images, so the lists are read here."""

from __future__ import annotations

from pathlib import Path

from mls.data.listing import printable, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.annotations import parsing
from mls.eval.data.one_class import lines, listed, numbered


def read(folder: Path) -> DataSet:
    """`annotations/{trainval,test}.txt` (image, breed from 1, species, number within the species) and `images`. A breed
    has no name but that of its images: `american_bulldog_100` is an american_bulldog."""
    files = [folder / "annotations" / f"{phase}.txt" for phase in ("trainval", "test")]
    rows = {file: _rows(file) for file in files}
    names: dict[int, bytes] = {}
    for file in files:
        for image, breed in rows[file]:
            name = image.rpartition(b"_")[0]
            if names.setdefault(breed, name) != name:
                raise DataError(
                    f"{show(file)} gives {printable(image)} the breed {breed}, which is {printable(names[breed])}: "
                    "download it again"
                )
    if sorted(names) != list(range(1, len(names) + 1)):
        raise DataError(f"{show(files[0])} skips a breed between 1 and {max(names)}: download it again")
    classes = [printable(names[breed]) for breed in sorted(names)]

    def split(phase: str, file: Path) -> LabelledImages:
        truth = numbered([breed for _, breed in rows[file]], len(classes), file)
        paths = [image + b".jpg" for image, _ in rows[file]]
        return listed(f"pets {phase}", folder / "images", paths, truth, classes, file)

    return DataSet("pets", split("train", files[0]), split("test", files[1]))


def _rows(file: Path) -> list[tuple[bytes, int]]:
    with parsing(file, "list of pets"):
        return [(image, int(breed)) for image, breed, _, _ in (line.split() for line in lines(file))]


DOWNLOAD = (
    "download images.tar.gz and annotations.tar.gz from www.robots.ox.ac.uk/~vgg/data/pets and unpack both into "
    "$MLS_DATA/oxford-iiit-pet"
)
register("pets", Layout(read, "oxford-iiit-pet", DOWNLOAD, {"classes": 37, "train": 3680, "test": 3669}))
