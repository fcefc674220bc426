"""What a protocol trains and tests on, before any label of it is hidden."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from mls import distributed
from mls.config import ScenesConfig
from mls.data.listing import locate
from mls.data.unreadable import say
from mls.errors import ConfigError, DataError
from mls.eval import data as data_sets
from mls.eval.data import DataSet, LabelledImages, class_folders, folder_of, scenes, table
from mls.eval.data.content import content_hash
from mls.eval.data.own import all_readable
from mls.eval.data.table import OwnLabels
from mls.eval.protocol import DataConfig, scenes_identity

OWN = ("folder", "table")  # data sets of one's own images


def load(config: DataConfig) -> DataSet:
    return _load(config.name, place(config), config.check_sizes, config.scenes, own_labels(config))


def place(config: DataConfig) -> str | None:
    """The folder itself: $MLS_DATA and the working folder may change."""
    if config.name == "scenes" or (config.name in OWN and config.root is None and config.labels_file):
        return None
    return str(folder_of(config.name, config.root).absolute())


def own_labels(config: DataConfig) -> OwnLabels | None:
    """How one's own images are read; None of published data sets."""
    if config.name not in OWN:
        if config.labels_file:
            raise ConfigError(f"data.labels_file is not for {config.name}: say data.name=table, or folder for a list")
        return None
    file, answers = (
        None if text is None else str(locate(text, key))
        for text, key in ((config.labels_file, "data.labels_file"), (config.answers, "data.answers"))
    )
    written = tuple(os.stat(one).st_mtime_ns for one in (file, answers, place(config)) if one and os.path.isfile(one))
    if config.name != "table" and (answers or config.classes or config.zero != "auto" or config.blank != "unknown"):
        raise ConfigError("data.answers, classes, zero and blank are for data.name=table: leave them out")
    how = (config.classes, config.zero, config.blank, config.seed, config.max_unreadable)
    return OwnLabels(file, answers, *how, written)


def content(config: DataConfig) -> str:
    """What tells the data apart from others of the same name; an error where they are not there."""
    if config.name == "scenes":  # made, not read
        return content_of_scenes(config.scenes)
    return _content(config.name, place(config), config.check_sizes, config.scenes, own_labels(config))


@lru_cache(maxsize=8)
def content_of_scenes(config: ScenesConfig) -> str:
    """Of the settings, as stored results know them, and of the photographs that the scenes are made of."""
    values = scenes_identity(asdict(config))
    photographs = content_hash(scenes.read(Path(), config)) if values.pop("objects", None) else ""
    settings = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return hashlib.sha256(f"ScenesConfig({settings}){photographs}".encode()).hexdigest()[:16]


@lru_cache(maxsize=8)
def _content(name: str, root: str | None, check_sizes: bool, config: ScenesConfig, own: OwnLabels | None) -> str:
    return content_hash(_load(name, root, check_sizes, config, own))


@lru_cache(maxsize=2)  # the cells of a suite share it
def _load(name: str, root: str | None, check_sizes: bool, config: ScenesConfig, own: OwnLabels | None) -> DataSet:
    if name == "scenes":
        return scenes.read(Path(), config)
    if own is not None:
        return _own(name, root, own)
    found = data_sets.build(name, root, check_sizes)
    if not isinstance(found.train, LabelledImages):
        raise DataError(f"{name} has objects or regions, not labels of images: use it in a protocol for these")
    return found


def _own(name: str, root: str | None, own: OwnLabels) -> DataSet:
    """One's own images, without those that cannot be read; what was found is told once."""
    folder = None if root is None else Path(root)
    if folder is not None and folder.is_file():  # data.root=list.txt
        if own.labels_file:
            raise ConfigError(f"data.root={folder} and data.labels_file both name a list of labels: set one of them")
        own, folder = replace(own, labels_file=str(folder)), None
    note = ""
    if name == "table":
        found, note = table.read(folder, own)
    elif own.labels_file:
        found = class_folders.read_list(Path(own.labels_file), folder)
    else:
        found = data_sets.build(name, folder)
    found = all_readable(DataSet(name, found.train, found.test, found.val), own.most_unreadable)
    if distributed.rank() == 0:
        say("\n".join(filter(None, [note, table.summary(found)])))
    return found
