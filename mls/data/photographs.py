"""Photographs in class folders as the objects of the scenes (`data.scenes.objects`): FOLDER/CLASS/*.jpg, or the same
under FOLDER/train and FOLDER/test. They stay where they are; a part of them is read into memory, small."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from mls.chunks import spaced
from mls.config import DataConfig
from mls.data.crops import centre
from mls.data.decode import UnreadableImage, decode
from mls.data.listing import FileSource, from_folder, list_images, locate, show
from mls.data.scenes import SPLITS, Instances
from mls.errors import DataError, unknown_name
from mls.streams import generator

SIDE = 48  # pixels of a photograph before it is placed
MOST = 600  # of a class and a split; 10 classes of both take 83 MB
FOR_TRAINING = 0.6  # share of each class, where the folder has no split


@cache
def photographs(folder: str, split: str) -> Instances:
    """Of one split; where the folder has none each class's photographs are shuffled, the same way each time."""
    if split not in SPLITS:
        raise unknown_name("split of the scenes", split, SPLITS, DataError)
    root = locate(folder, "data.scenes.objects")
    split_there = all((root / name).is_dir() for name in SPLITS)
    sources = [_of_classes(root / name) for name in SPLITS] if split_there else [_of_classes(root)]
    if len({tuple(source.class_names or ()) for source in sources}) > 1:
        raise DataError(f"{show(root)} has other classes in train than in test: give both the same folders")
    source = sources[SPLITS.index(split) if split_there else 0]
    labels, names = source.labels, source.class_names
    assert labels is not None and names is not None
    chosen = [
        _part(labels[:, column].nonzero().squeeze(1), split, split_there, names[column]) for column in range(len(names))
    ]
    glyphs = torch.stack([_read(source, number) for numbers in chosen for number in numbers.tolist()])
    counts = torch.tensor([len(numbers) for numbers in chosen])
    numbers = torch.cat(chosen)
    made_of = hashlib.sha256(b"\0".join(source.relative_paths[number] for number in numbers.tolist())).hexdigest()[:16]
    return Instances(glyphs, numbers, counts.cumsum(0) - counts, counts, tuple(names), made_of)


def _of_classes(folder: Path) -> FileSource:
    if not folder.is_dir():
        raise DataError(f"data.scenes.objects {show(folder)} is a file: name the folder that has the class folders")
    for part in sorted(folder.iterdir()):
        if part.is_dir() and not part.name.startswith(".") and not list_images(part):
            raise DataError(f"the class folder {show(part)} has no images: fill it, or take it away")
    source = from_folder(DataConfig(source="folder", root=str(folder)))
    if source.class_names is None:
        raise DataError(
            f"data.scenes.objects {show(folder)} has no class folders: lay the photographs out as FOLDER/CLASS/*.jpg, "
            "two classes or more"
        )
    return source


def _part(numbers: Tensor, split: str, split_there: bool, name: str) -> Tensor:
    if not split_there:
        if len(numbers) < 2:
            raise DataError(f"class {name} has a single photograph: scenes for training and for testing need one each")
        numbers = numbers[torch.randperm(len(numbers), generator=generator(0, "photographs", name))]
        cut = min(len(numbers) - 1, max(1, round(FOR_TRAINING * len(numbers))))
        numbers = numbers[:cut] if split == "train" else numbers[cut:]
    return numbers[spaced(len(numbers), MOST)]


def _read(source: FileSource, number: int) -> UInt8[Tensor, "3 side side"]:
    try:
        return centre(decode(source.read(number)), SIDE)
    except (UnreadableImage, OSError) as error:
        raise DataError(f"cannot read {source.describe(number)} ({error}): mend it, or take it away") from None
