"""`data.source=huggingface`: a data set of Hugging Face's library `datasets`, from a folder that `save_to_disk` wrote
or by its name. Rows lie memory-mapped on the disk, where any of them is read at once."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mls.config import DataConfig
from mls.data.listing import multi_hot, multi_hot_of, root_text, show
from mls.errors import ConfigError, DataError, reason
from mls.streams import generator


def from_huggingface(config: DataConfig) -> HuggingFaceSource:
    """`data.root`: the folder or the name; `data.annotations`: the split, by default train."""
    if find_spec("datasets") is None:
        raise ConfigError('data.source=huggingface needs the library datasets: pip install "mls[huggingface]"')
    return HuggingFaceSource(root_text(config), config.annotations, config.limit)


class HuggingFaceSource:
    def __init__(self, root: str, split: str | None = None, limit: int | None = None) -> None:
        from datasets import ClassLabel, Image  # pyright: ignore

        found = _loaded(root, split)
        images = [name for name, kind in found.features.items() if isinstance(kind, Image)]
        if not images:
            columns = ", ".join(found.column_names)
            raise DataError(f"{show(root)} has no column of images (columns: {columns}): name another data set")
        if not len(found):
            raise DataError(f"{show(root)} has no images: name another split with data.annotations")
        self.name, self.column = f"huggingface:{show(Path(root).name)}", images[0]
        self.identity = f"{found.split}/{found._fingerprint}"  # the library's own hash of rows and where they come from
        kinds = [(name, kind) for name, kind in found.features.items() if isinstance(kind, ClassLabel)]
        self._count = min(len(found), limit or len(found))
        self.class_names: list[str] | None = None
        if kinds:
            label, kind = kinds[0]
            numbers = np.array([-1 if one is None else one for one in found[label][: self._count]], np.int64)
            if numbers.min() >= 0:  # -1 says that nobody knows
                self.class_names = list(kind.names)
                self._pairs = np.stack([np.arange(len(numbers)), numbers], axis=1)
        self._data = found.select_columns([self.column]).cast_column(self.column, Image(decode=False))

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> Float[Tensor, "images classes"] | None:
        return None if self.class_names is None else multi_hot(self._pairs, len(self), len(self.class_names))

    def labels_of(self, ids: Int64[Tensor, " some"]) -> Float[Tensor, "some classes"]:
        assert self.class_names is not None
        return multi_hot_of(ids, self._pairs, len(self), len(self.class_names))

    def read(self, index: int) -> bytes:
        row = self._data[int(index)][self.column] or {}
        if row.get("bytes") is not None:
            return row["bytes"]
        if not row.get("path"):
            raise OSError("the row has neither bytes nor a path")
        with open(row["path"], "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        return f"{self.name}:{index}"

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return torch.randperm(len(self), generator=generator(seed, "order", epoch)).numpy()


def _loaded(root: str, split: str | None) -> Any:
    import datasets  # pyright: ignore

    folder = Path(os.path.expandvars(os.path.expanduser(root)))
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(root)
    except Exception as error:  # there is no end to what it raises
        raise DataError(
            f"{show(root)} cannot be loaded by datasets ({reason(error)}): name a folder that save_to_disk wrote, or a "
            "data set that can be downloaded here"
        ) from None
    if not isinstance(found, dict):
        if split is not None and str(found.split) != split:
            of = f"of the split {found.split}" if found.split is not None else "without a split's name"
            raise DataError(f"{show(root)} holds one table {of}: leave out data.annotations={split}")
        return found
    chosen = split or "train"
    if chosen not in found:
        known = ", ".join(map(str, found))
        raise DataError(f"{show(root)} has no split {chosen}: set data.annotations to one of those there ({known})")
    return found[chosen]
