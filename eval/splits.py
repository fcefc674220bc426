"""What a protocol trains and tests on, before any label of it is hidden."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from mls.config import ScenesConfig
from mls.errors import DataError
from mls.eval import data as data_sets
from mls.eval.data import DataSet, LabelledImages, folder_of, scenes
from mls.eval.data.content import content_hash
from mls.eval.protocol import DataConfig


def load(config: DataConfig) -> DataSet:
    return _load(config.name, place(config), config.check_sizes, config.scenes)


def place(config: DataConfig) -> str | None:
    """The folder itself: $MLS_DATA and the working folder may change."""
    return None if config.name == "scenes" else str(folder_of(config.name, config.root).absolute())


def content(config: DataConfig) -> str:
    """What tells the data apart from others of the same name; an error where they are not there."""
    if config.name == "scenes":  # made, not read
        return hashlib.sha256(repr(config.scenes).encode()).hexdigest()[:16]
    return _content(config.name, place(config), config.check_sizes, config.scenes)


@lru_cache(maxsize=8)
def _content(name: str, root: str | None, check_sizes: bool, config: ScenesConfig) -> str:
    return content_hash(_load(name, root, check_sizes, config))


@lru_cache(maxsize=2)  # the cells of a suite share it
def _load(name: str, root: str | None, check_sizes: bool, config: ScenesConfig) -> DataSet:
    if name == "scenes":
        return scenes.read(Path(), config)
    found = data_sets.build(name, root, check_sizes)
    if not isinstance(found.train, LabelledImages):
        raise DataError(f"{name} has objects or regions, not labels of images: use it in a protocol for these")
    return found
