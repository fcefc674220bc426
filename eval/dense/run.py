"""Runs one protocol of `task: detection` or `task: segmentation`: the data, the network, training, one test."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mls import distributed
from mls.chunks import chunks
from mls.eval.dense import pictures
from mls.eval.dense.coco_ap import Detections, coco_ap
from mls.eval.dense.detector import Detector
from mls.eval.dense.loop import DenseTraining
from mls.eval.dense.prepare import build_backbone, load_images
from mls.eval.dense.schema import Dense, Detection, Segmentation
from mls.eval.dense.segmenter import Segmenter
from mls.eval.dense.voc_ap import voc_ap
from mls.eval.outcome import Outcome, for_file
from mls.frameworks import installed as frameworks
from mls.frozen.confusion import confusion, segmentation_metrics
from mls.progress import counting
from mls.streams import initialisation

TEST_BATCH = 8  # images


def run(protocol: Dense, weights: str, seed: int, folder: Path | None, title: str = "", quiet: bool = False) -> Outcome:
    """Train and test once. With a folder the same call goes on where it was stopped."""
    if protocol.backend != "torchvision":
        return _run_of_backend(protocol.backend)(protocol, weights, seed, folder, title or protocol.recipe, quiet)
    began = time.monotonic()
    distributed.start(protocol.training.device)
    data = load_images(protocol)
    network = build_network(protocol, weights, seed, data.train.class_names)
    training = DenseTraining(protocol, network, data.train, seed, folder)
    training.train(title or protocol.recipe, quiet)
    values = tested(protocol, network, data.test, quiet)
    if folder is not None and distributed.rank() == 0:
        rows = pictures.chosen(data.test)
        found = network.predict([data.test.pixels(row) for row in rows])
        pictures.save(folder / "found.png", data.test, rows, found)
    tested_weights, selection = for_file(network.state_dict()), f"after {protocol.training.steps} steps"
    return Outcome(values, selection, None, time.monotonic() - began, tested_weights)


def _run_of_backend(backend: str) -> Callable[..., Outcome]:
    """`run` of another framework's trainer, which is imported only here."""
    frameworks.load(backend)
    return importlib.import_module(f"mls.eval.dense.with_{backend}").run


def build_network(protocol: Dense, weights: str, seed: int, class_names: list[str]) -> Detector | Segmenter:
    """Heads are the same whatever the backbone has drawn; images are standardised as when it was pretrained."""
    backbone, mean, std = build_backbone(protocol, weights, seed)
    with initialisation(seed, "dense"):
        if isinstance(protocol, Detection):
            return Detector(backbone, protocol, len(class_names), mean, std)
        return Segmenter(backbone, protocol, len(class_names), mean, std)


def tested(protocol: Dense, network: Any, images: Any, quiet: bool) -> dict[str, float]:
    if isinstance(protocol, Segmentation):
        classes = len(images.class_names)
        counts = torch.zeros(classes, classes, dtype=torch.int64)
        for row, found in predictions(network, images, quiet):
            counts += confusion(found, images.labels_for(row, found.shape), classes)
        return segmentation_metrics(distributed.total(counts))
    mine = dict(predictions(network, images, quiet))
    everything: dict[int, Detections] = {}
    for part in distributed.objects(mine):
        everything |= part
    found = [everything[row] for row in range(len(images))]
    if images.metric != "voc07":
        return coco_ap(found, images, protocol.model.masks)
    by_area = voc_ap(found, images, eleven_points=False)
    return voc_ap(found, images) | {f"{name}_area": value for name, value in by_area.items()}


@torch.no_grad()
def predictions(network: Any, images: Any, quiet: bool) -> Iterator[tuple[int, Any]]:
    """(row, what is found) of this process' share of the images."""
    network.eval()
    rows = range(distributed.rank(), len(images), distributed.world())
    with counting("test images", len(rows), not quiet and distributed.rank() == 0) as progress:
        for part in chunks(len(rows), TEST_BATCH):
            batch = rows[part]
            yield from zip(batch, network.predict([images.pixels(row) for row in batch]), strict=True)
            progress(part.stop)
