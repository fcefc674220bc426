"""NUS-WIDE with its 81 concepts: the official lists, or the .npy files of the papers on single positive labels. These
papers take other images than the official lists name, and not all the same: compare only within one of the two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from mls.data.listing import show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, presence, register
from mls.eval.data.formatted import is_formatted, listed_images, read_formatted


def read(folder: Path) -> DataSet:
    r"""`ImageList/{Train,Test}Imagelist.txt` (paths such as `actor\0001_2124494179.jpg`), `Concepts81.txt` there or in
    `ConceptsList`, `Groundtruth/TrainTestLabels/Labels_{concept}_{Train,Test}.txt` (a 0 or 1 for each image) and the
    images in `Flickr` or `images`."""
    if is_formatted(folder):
        return read_formatted("nuswide", folder, _image_folders(folder))
    files = [folder / "Concepts81.txt", folder / "ConceptsList" / "Concepts81.txt"]
    concepts = (files[0] if files[0].is_file() else files[1]).read_text().split()
    return DataSet("nuswide", _split(folder, "Train", concepts), _split(folder, "Test", concepts))


def _image_folders(folder: Path) -> list[Path]:
    return [folder / "Flickr", folder / "images"]


def _split(folder: Path, phase: str, concepts: list[str]) -> LabelledImages:
    file = folder / "ImageList" / f"{phase}Imagelist.txt"
    paths = [line.strip().replace(b"\\", b"/") for line in file.read_bytes().splitlines() if line.strip()]
    labels = folder / "Groundtruth" / "TrainTestLabels"
    columns = [_column(labels / f"Labels_{concept}_{phase}.txt", len(paths)) for concept in concepts]
    images = listed_images(f"nuswide {phase}", _image_folders(folder), paths, file)
    return LabelledImages(images, presence(torch.from_numpy(np.stack(columns, axis=1))), concepts)


def _column(file: Path, images: int) -> UInt8[np.ndarray, "images"]:
    text = np.frombuffer(file.read_bytes(), np.uint8)
    marks = text[~np.isin(text, tuple(b" \r\n"))] - ord("0")
    if len(marks) != images or (marks > 1).any():
        raise DataError(
            f"{show(file)} is not a 0 or 1 for each of {images} listed images: unpack Groundtruth.zip again"
        )
    return marks


register(
    "nuswide",
    Layout(
        read,
        "nuswide",
        "download ImageList, Groundtruth, ConceptsList and the images (Flickr) of NUS-WIDE from lms.comp.nus.edu.sg "
        "and unpack them into $MLS_DATA/nuswide",
        {"classes": 81},
    ),
)
