"""`masks`: the user's own images, a mask for each whose pixels are numbers of classes, and a list of the classes."""

from __future__ import annotations

import os
from pathlib import Path

from mls.chunks import spaced
from mls.data.listing import LOOKED_FOR, list_images, show
from mls.data.masks import FOLDERS, LISTS, IndexedFiles, classes_of
from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.own import data_set, listed, part_of, split
from mls.eval.data.regions import RegionImages
from mls.progress import counting

LOOKED_AT = 64  # masks of each part, before anything is trained; the others when they are read
FIX = "correct it, or the list of classes"


def read(root: Path) -> DataSet[RegionImages]:
    """`images/{train,val,test}` and `masks/...` with the same names and the suffix .png; without these folders the
    images are split. `classes.txt` has a name a line, 255 is void; `classes.yaml` has `names`, a list or numbers with
    names, and `void`, a number or several."""
    names, void = classes_of(root)
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if not (root / "images").is_dir() or folder is None:
        missing = "images" if folder is not None else "masks"
        raise DataError(f"{show(root)} has no folder {missing}: it needs images/, masks/ and {LISTS[0]}")
    parts = _parts(root / "images")
    return data_set(
        "masks", {part: _part(part, root, folder, found, names, void) for part, found in parts.items()}, root
    )


def _parts(folder: Path) -> dict[str, list[bytes]]:
    paths = list_images(folder)
    parts: dict[str, list[bytes]] = {}
    for path in paths:
        first, _, inside = path.partition(b"/")
        parts.setdefault((inside and part_of(os.fsdecode(first))) or "", []).append(path)
    if not paths:
        raise DataError(f"no images under {show(folder)} ({LOOKED_FOR}): put them there")
    if len(parts) == 1:
        return {part: [paths[row] for row in rows] for part, rows in split(paths).items()}
    if "" in parts or "train" not in parts:
        first = f"{len(parts[''])} beside them" if "" in parts else "no train"
        raise DataError(
            f"{show(folder)} has {', '.join(part for part in parts if part)} and {first}: sort the images into train, "
            "val and test, or take these folders away and a fifth is held out"
        )
    return parts


def _part(
    part: str, root: Path, folder: Path, paths: list[bytes], names: dict[int, str], void: tuple[int, ...]
) -> RegionImages:
    files = [folder / Path(os.fsdecode(path)).with_suffix(".png") for path in paths]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(files)} masks of {show(root)} for {part} are missing (first: "
            f"{show(missing[0])}): put them there, or take their images away"
        )
    source = listed(f"masks {part}", root, [b"images/" + path for path in paths], root / "images")
    labels = IndexedFiles(files, len(names), void=void, values=tuple(names), fix=FIX)
    with counting(f"masks of {part}", min(len(files), LOOKED_AT)) as progress:
        for number, row in enumerate(spaced(len(files), LOOKED_AT), start=1):
            labels(row)
            progress(number)
    return RegionImages(source, labels, list(names.values()))


register("masks", Layout(read, "masks", "put images/, masks/ and classes.yaml there", own=True))
