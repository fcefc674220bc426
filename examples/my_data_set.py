"""A data set of your own, to pretrain on and to evaluate on: scikit-learn's handwritten digits, one an image.

mls pretrain mls_scenes_tiny --import examples/my_data_set.py data.source=digits data.batch_size=64
mls eval run knn_scenes --import examples/my_data_set.py data.name=digits metric=top1 --weights runs/mls_scenes_tiny-…
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot

from mls.config import DataConfig
from mls.data import sources
from mls.eval import data
from mls.streams import generator


class Digits:
    """What a source has to have (mls.data.Source): a numbered collection of images that never changes its order."""

    name = "digits"
    class_names = tuple("0123456789")  # None where there are no labels; `labels` is None then, too

    def __init__(self, first: int, last: int | None) -> None:
        images, truth = load_digits(return_X_y=True)  # [1797, 64], grey from 0 to 16
        self.images = torch.from_numpy(images[first:last] * 15.9).byte().view(-1, 1, 8, 8).expand(-1, 3, 8, 8)
        self.truth = torch.from_numpy(truth[first:last]).long()

    @property
    def labels(self) -> Tensor:  # [images, classes], for monitoring alone
        return one_hot(self.truth, 10).float()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:  # uint8 pixels, or the bytes of an image file
        return self.images[index].repeat_interleave(4, 1).repeat_interleave(4, 2)  # [3, 32, 32]

    def describe(self, index: int) -> str:
        return f"digit {index}"

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return torch.randperm(len(self), generator=generator(seed, "order", epoch)).numpy()


@sources.register("digits")
def for_pretraining(config: DataConfig) -> Digits:
    return Digits(0, min(config.limit or 1400, 1400))


def for_evaluation(root: Path) -> data.DataSet:
    parts = [data.LabelledImages(part, part.truth, part.class_names) for part in (Digits(0, 1400), Digits(1400, None))]
    return data.DataSet("digits", *parts)


data.register("digits", data.Layout(for_evaluation, folder="", download=""))
