"""The images of a protocol and its backbone, in memory or as a file that another framework reads, for all back-ends."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

from mls import distributed
from mls.config import AugmentConfig, ScenesConfig
from mls.data.truth import AS_DETECTRON2
from mls.errors import DataError, command
from mls.eval import data as data_sets
from mls.eval.data import DataSet, objects, regions
from mls.eval.data.content import content_hash
from mls.eval.data.objects import ObjectImages
from mls.eval.data.own import all_readable
from mls.eval.data.regions import RegionImages
from mls.eval.dense.schema import Dense, Detection, FrozenDense
from mls.eval.schema import DataSetConfig
from mls.eval.splits import content_of_scenes
from mls.exporting.source import Source
from mls.models import card_of, load_backbone, untrained
from mls.models.backbones import Backbone
from mls.streams import initialisation

SCENES = {"scenes_objects": objects.scenes, "scenes_regions": regions.scenes}
Facts = tuple[str, str | None, bool, ScenesConfig, float]
OF_OBJECTS = ("detection", "objects")  # tasks
NOT_LEARNT = ("dense_cluster", "saliency")  # tasks that look at test images alone
BACKGROUND = ("background", "ground")


def load_images(protocol: Dense | FrozenDense) -> DataSet[Any]:
    found = _load(without_workers(protocol.data))
    wanted = ObjectImages if protocol.task in OF_OBJECTS else RegionImages
    if not isinstance(found.train, wanted):
        fitting = (
            "coco, yolo, coco2017, scenes_objects" if wanted is ObjectImages else "masks, cityscapes, scenes_regions"
        )
        raise DataError(f"task {protocol.task} cannot use {protocol.data.name}: choose another data.name ({fitting})")
    if data_sets.LAYOUTS[protocol.data.name].test_only and protocol.task not in NOT_LEARNT:
        raise DataError(
            f"{protocol.data.name} has no training images, and task {protocol.task} learns from some: choose another "
            f"data.name, or a task that does not ({', '.join(NOT_LEARNT)})"
        )
    if protocol.task == "saliency" and found.train.class_names[0] not in BACKGROUND:
        raise DataError(
            f"task saliency takes all but the first class for salient, and that of {protocol.data.name} is "
            f"{found.train.class_names[0]}, no {' or '.join(BACKGROUND)}: choose another data.name (scenes_regions, "
            "voc12aug, ecssd, duts, dut_omron, or masks with such a class)"
        )
    if isinstance(protocol, Detection):
        if protocol.model.masks and found.train.everything.outlines is None:  # pyright: ignore[reportAttributeAccessIssue]
            raise DataError(f"{protocol.data.name} has boxes and no masks: set model.masks=false")
        _settle(protocol, found)
    if data_sets.LAYOUTS[protocol.data.name].own and distributed.rank() == 0:
        _say(summary(found))
    return found


def summary(data: DataSet[Any]) -> str:
    """What was found in the user's own data.

    >>> summary(objects.scenes(ScenesConfig(count=3, test_count=2)))
    'scenes_objects: 3 training images with 8 objects, 2 test images with 5 objects, 10 classes'
    """
    parts = {"training": data.train, "validation": data.val, "test": data.test}
    told = [f"{len(part)} {name} images{_objects(part)}" for name, part in parts.items() if part is not None]
    return f"{data.name}: {', '.join(told)}, {len(data.train.class_names)} classes"


def _objects(part: Any) -> str:
    return f" with {len(part.everything)} objects" if isinstance(part, ObjectImages) else ""


def _settle(protocol: Detection, data: DataSet[ObjectImages]) -> None:
    """Odd entries of the annotations are left out, and that is said once; or they are refused."""
    lists = [part.odd for part in (data.train, data.test) if part.odd is not None and len(part.odd)]
    wrong = set().union(*(odd.found for odd in lists)) - {*AS_DETECTRON2}
    words = "; ".join(map(str, lists))
    check = command("mls data check --dataset", protocol.data.name, *filter(None, [protocol.data.root]))
    if protocol.backend == "detectron2" and wrong and not data_sets.LAYOUTS[data.name].own:
        raise DataError(f"{words}; detectron2 would learn from them: repair them ({check} lists all)")
    if protocol.data.odd == "refuse" and wrong:
        raise DataError(f"{words}: repair them ({check} lists all), or set data.odd=drop")
    if lists and distributed.rank() == 0:
        _say(f"{words}; they are left out ({check} lists all)")


@lru_cache  # once
def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def without_workers(data: DataSetConfig) -> Facts:
    folder = None if data.name in SCENES else str(data_sets.folder_of(data.name, data.root).absolute())
    return data.name, folder, data.check_sizes, data.scenes, data.max_unreadable


@lru_cache(maxsize=2)  # shared by the cells of a suite
def _load(facts: Facts) -> DataSet[Any]:
    name, root, check_sizes, scenes, most = facts
    found = SCENES[name](scenes) if name in SCENES else data_sets.build(name, root, check_sizes)
    return all_readable(found, most) if data_sets.LAYOUTS[name].own else found


def content(protocol: Dense | FrozenDense) -> str:
    """What tells the data apart from others of the same name; an error where they are not there."""
    if protocol.data.name in SCENES:  # made, not read
        return content_of_scenes(protocol.data.scenes)
    load_images(protocol)  # says what is odd
    return _content(without_workers(protocol.data))


@lru_cache(maxsize=8)
def _content(facts: Facts) -> str:
    return content_hash(_load(facts))


def build_backbone(protocol: Dense | FrozenDense, weights: str, seed: int) -> tuple[Backbone, list[float], list[float]]:
    """The backbone, with the mean and std (of pixels from 0 to 1) of its pretraining."""
    wanted = backbone_name(protocol, weights)
    facts = {"mean": AugmentConfig().mean, "std": AugmentConfig().std} | (card_of(wanted) or {})
    with initialisation(seed):
        return load_backbone(wanted), list(facts["mean"]), list(facts["std"])


def backbone_name(protocol: Dense | FrozenDense, weights: str) -> str:
    return untrained(protocol.model.backbone) if weights == "random" else weights


def backbone_source(protocol: Dense, weights: str, seed: int) -> Source:
    """The same backbone for the exporters."""
    with initialisation(seed):
        return Source.open(backbone_name(protocol, weights))
