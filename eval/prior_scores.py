"""`training.prior_scores`: class scores of the training images from a model that the user has, such as similarities of
images and class names. A loss makes pseudo-labels of them (mls/core/losses/prior_scores.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mls.errors import DataError
from mls.files import sha256


def read(file: str, images: int, classes: int) -> Float[Tensor, "images classes"]:
    """One row for each training image, in the data set's order and before a validation part is held out."""
    path = existing(file)
    try:
        scores = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is no .npy file of numbers ({error}): write it with numpy.save") from None
    if scores.shape != (images, classes):
        raise DataError(
            f"{path} has the shape {tuple(scores.shape)}, but there are {images} training images (before any is held "
            f"out to validate on) and {classes} classes: write a row for each image and a column for each class"
        )
    found = torch.from_numpy(scores.astype(np.float32))
    if not found.isfinite().all():
        raise DataError(f"{path} has scores that are not finite: replace them by numbers")
    return found


def content(file: str) -> str:
    """Tells two files apart, wherever they lie."""
    return sha256(existing(file))


def existing(file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"training.prior_scores={file} is not there: give a .npy file of images × classes")
    return path
