"""What a protocol trains and tests on, before any label of it is hidden."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from mls.config import ScenesConfig
from mls.errors import DataError
from mls.eval import data as data_sets
from mls.eval.data import DataSet, LabelledImages, scenes
from mls.eval.protocol import DataConfig


def load(config: DataConfig) -> DataSet:
    return _load(config.name, config.root, config.check_sizes, config.scenes)


@lru_cache(maxsize=2)  # the cells of a suite share it
def _load(name: str, root: str | None, check_sizes: bool, config: ScenesConfig) -> DataSet:
    if name == "scenes":
        return scenes.read(Path(), config)
    found = data_sets.build(name, root, check_sizes)
    if not isinstance(found.train, LabelledImages):
        raise DataError(f"{name} has objects or regions, not labels of images: use it in a protocol for these")
    return found
