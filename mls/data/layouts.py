"""Writes the embedded scenes to disk as COCO, VOC, Cityscapes or class folders: the published layouts, with real image
files, so that readers of the published data sets can be tried without them. Drawing the scenes is in scenes.py."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from mls.data.pictures import VOID, Export, Picture, polygons, save_photo, with_folder, write_text
from mls.data.scenes import CLASS_NAMES, SPLITS
from mls.data.voc_layout import voc
from mls.errors import DataError, reason, unknown_name

COCO_IDS = [1, 2, 3, 5, 6, 7, 9, 10, 11, 13]  # with gaps, as COCO's own: an id is not a column
THINGS = {0: 24, 1: 25, 2: 26, 3: 27, 4: 28, 5: 31, 6: 32, 7: 33}  # digit: Cityscapes id of a class with instances
DIGIT_IDS = [*THINGS.values(), 19, 20]  # 8 is a traffic light and 9 a traffic sign: no instances
GROUND_IDS = [7, 8, 11, 12, 13, 21, 22, 23]  # by scene type: road, sidewalk, building, wall, fence, vegetation, ...
OUT_OF_ROI, BORDER = 3, 1  # the id of the border, and its pixels


def write(
    layout: str,
    out: Path,
    train: int = 500,
    test: int = 200,
    size: int = 128,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write `train` and `test` scenes into the empty or new folder `out`. After an error or Ctrl-C the files are
    removed."""
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS, DataError)
    for split, count in zip(SPLITS, (train, test), strict=True):
        if count < 1:
            raise DataError(f"{count} {split} scenes make no data set: ask for 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder: name a new one, or delete what is there")
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        LAYOUTS[layout](Export(out, train, test, size, seed, progress))
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if existed:
            out.mkdir(exist_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"cannot write the scenes to {out} ({reason(error)}): choose another --out") from error
        raise


def coco(export: Export) -> None:
    """COCO 2017 detection. The test scenes are val2017; there are no crowd regions."""
    for split, name in zip(SPLITS, ("train2017", "val2017"), strict=True):
        images, annotations = [], []
        for number, picture in enumerate(export.pictures(split), start=1):
            file = f"{number:012d}.jpg"
            save_photo(picture, export.out / name / file)
            side = {"height": export.size, "width": export.size}
            images.append({"license": 1, "file_name": file, **side, "id": number})
            for digit, box, mask in zip(picture.classes, picture.boxes, picture.masks, strict=True):
                x0, y0, x1, y1 = map(float, box)
                annotations.append(
                    {
                        "segmentation": [[float(v) for v in polygon] for polygon in polygons(mask)],
                        "area": float(mask.sum()),
                        "iscrowd": 0,
                        "image_id": number,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "category_id": COCO_IDS[digit],
                        "id": len(annotations) + 1,
                    }
                )
        content = {
            "info": {"description": "Embedded scenes in COCO's layout", "version": "1.0", "year": 2017},
            "licenses": [{"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"supercategory": "digit", "id": COCO_IDS[digit], "name": name}
                for digit, name in enumerate(CLASS_NAMES)
            ],
        }
        write_text(export.out / "annotations" / f"instances_{name}.json", json.dumps(content))


def cityscapes(export: Export) -> None:
    """leftImg8bit and gtFine. The train scenes are two cities, the test scenes are the val city.

    Digits 0 to 7 take the eight ids with instances (person to bicycle), 8 and 9 are traffic light and sign; the scene
    type's ground is road, sidewalk, building, wall, fence, vegetation, terrain or sky. The nineteenth training class,
    pole, does not occur. A thin border is "out of roi", which is void.
    """
    from torchvision.datasets import Cityscapes

    table = {entry.id: entry for entry in Cityscapes.classes}
    names = {number: entry.name for number, entry in table.items()}
    train_ids = np.full(256, VOID, np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    for number, entry in table.items():
        if number >= 0:
            train_ids[number], colours[number] = entry.train_id % 256, entry.color
    for split, folder, cities in (("train", "train", ("aachen", "bochum")), ("test", "val", ("frankfurt",))):
        for number, picture in enumerate(export.pictures(split)):
            city = cities[number % len(cities)]
            stem = f"{city}_{number // len(cities):06d}_000019"
            photo = export.out / "leftImg8bit" / folder / city / f"{stem}_leftImg8bit.png"
            save_photo(picture, photo)
            labels, instances = _cityscapes_ids(picture)
            stem = str(with_folder(export.out / "gtFine" / folder / city / stem))
            Image.fromarray(labels).save(f"{stem}_gtFine_labelIds.png")
            Image.fromarray(train_ids[labels]).save(f"{stem}_gtFine_labelTrainIds.png")
            Image.fromarray(instances).save(f"{stem}_gtFine_instanceIds.png")
            Image.fromarray(colours[labels]).save(f"{stem}_gtFine_color.png")
            write_text(Path(f"{stem}_gtFine_polygons.json"), _cityscapes_polygons(picture, names))


def _cityscapes_ids(picture: Picture) -> tuple[UInt8[np.ndarray, "size size"], UInt16[np.ndarray, "size size"]]:
    size = len(picture.image)
    labels = np.full((size, size), GROUND_IDS[picture.type % len(GROUND_IDS)], np.uint8)
    instances = labels.astype(np.uint16)
    instance_count: Counter[int] = Counter()
    for digit, mask in zip(picture.classes, picture.masks, strict=True):
        labels[mask] = number = DIGIT_IDS[digit]
        instances[mask] = number * 1000 + instance_count[digit] if digit in THINGS else number
        instance_count[digit] += 1
    border = np.ones((size, size), bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    labels[border] = instances[border] = OUT_OF_ROI
    return labels, instances


def _cityscapes_polygons(picture: Picture, names: dict[int, str]) -> str:
    size = len(picture.image)
    whole = [[0, 0], [size, 0], [size, size], [0, size]]
    objects = [{"label": names[GROUND_IDS[picture.type % len(GROUND_IDS)]], "polygon": whole}]
    for digit, mask in zip(picture.classes, picture.masks, strict=True):
        for flat in polygons(mask):
            points = [list(point) for point in zip(flat[::2], flat[1::2], strict=True)]
            objects.append({"label": names[DIGIT_IDS[digit]], "polygon": points})
    return json.dumps({"imgHeight": size, "imgWidth": size, "objects": objects})


def folders(export: Export) -> None:
    """train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet. The class is the digit with the most visible pixels."""
    for split, folder in zip(SPLITS, ("train", "val"), strict=True):
        counts: Counter[str] = Counter()
        for number, picture in enumerate(export.pictures(split), start=1):
            largest = CLASS_NAMES[picture.classes[int(picture.masks.sum((1, 2)).argmax())]]
            save_photo(picture, export.out / folder / largest / f"{number:06d}.jpg")
            counts[largest] += 1
        if missing := [name for name in CLASS_NAMES if not counts[name]]:
            raise DataError(
                f"none of the {counts.total()} {split} scenes belongs to class {', '.join(missing)}, and class numbers "
                f"are counted from the folders that exist: raise --{split}"
            )


LAYOUTS: dict[str, Callable[[Export], None]] = {"coco": coco, "voc": voc, "cityscapes": cityscapes, "folders": folders}
