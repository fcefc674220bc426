"""`masks`: the user's own images, a mask for each whose pixels are numbers of classes, and a list of the classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mls import yaml_files
from mls.chunks import spaced
from mls.data.listing import LOOKED_FOR, list_images, printable, show
from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.own import data_set, listed, numbered_names, part_of, split
from mls.eval.data.regions import VOID, IndexedFiles, RegionImages
from mls.progress import counting

LISTS = ("classes.yaml", "classes.yml", "classes.txt")
FOLDERS = ("masks", "labels", "annotations")
LOOKED_AT = 64  # masks of each part, before anything is trained; the others when they are read
FIX = "correct it, or the list of classes"


def read(root: Path) -> DataSet[RegionImages]:
    """`images/{train,val,test}` and `masks/...` with the same names and the suffix .png; without these folders the
    images are split. `classes.txt` has a name a line, 255 is void; `classes.yaml` has `names`, a list or numbers with
    names, and `void`, a number or several."""
    names, void = _classes(root)
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


def _classes(root: Path) -> tuple[dict[int, str], tuple[int, ...]]:
    """The number and name of each class, by number, and the numbers of no class."""
    file = next((root / name for name in LISTS if (root / name).is_file()), None)
    if file is None:
        raise DataError(
            f"{show(root)} has no list of classes: write {LISTS[0]}, with `names: [road, tree]` and `void: 255`"
        )
    if file.suffix == ".txt":
        lines = [printable(line.strip()) for line in file.read_bytes().splitlines()]
        content: Any = {"names": [line for line in lines if line]}
    else:
        content = yaml_files.read(file, numbered=True)[0]
    numbered = numbered_names(content, file, ", and `void: 255`, a number or several")
    void = content.get("void", VOID)
    voids = void if isinstance(void, list) else [void]
    if not all(type(number) is int and 0 <= number < 1 << 16 for number in voids):
        raise DataError(f"{show(file)} says void: {void}: write `void: 255`, a number or a list of numbers")
    numbered = {number: name for number, name in numbered.items() if number not in voids}
    if len(numbered) > VOID:
        raise DataError(f"{show(file)} has {len(numbered)} classes: at most {VOID} are read, so join some")
    return numbered, tuple(voids)


register("masks", Layout(read, "masks", "put images/, masks/ and classes.yaml there", own=True))
