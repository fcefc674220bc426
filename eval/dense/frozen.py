"""`task: dense_linear`, `dense_knn`, `dense_cluster`: what frozen maps know of the class of each pixel; `objects`,
`saliency`: of where things are. Maps come from maps.py, what is computed on patches from mls/frozen/patches.py and
discovery.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import box_iou

from mls.core import matching
from mls.errors import ConfigError, DataError
from mls.eval.data import DataSet
from mls.eval.dense.maps import Extractor, Maps
from mls.eval.dense.prepare import load_images
from mls.eval.dense.schema import FrozenDense
from mls.eval.outcome import Outcome
from mls.frozen import discovery, patches, probe
from mls.frozen.confusion import confusion, segmentation_metrics
from mls.progress import counting
from mls.streams import generator

QUERIES = 2048  # patches that are answered together
MIDDLE = (0.15, 0.85)  # of both sides: half of an image's area, where most objects stand
Scores = Float[Tensor, "images classes rows columns"]


class Task:
    """One protocol on one network: its images, its maps, and where progress is shown."""

    def __init__(self, protocol: FrozenDense, weights: str, seed: int, title: str, quiet: bool) -> None:
        self.protocol, self.seed, self.title, self.quiet = protocol, seed, title or protocol.recipe, quiet
        self.data: DataSet[Any] = load_images(protocol)
        self.extractor = Extractor(protocol, weights, seed, self.data.train)
        self.classes = len(self.data.train.class_names)

    def maps(self, part: str, rows: Int64[Tensor, "rows"] | None = None) -> Maps:
        return self.extractor.of(getattr(self.data, part), f"maps of {self.data.name} {part}", self.quiet, rows)

    def training_maps(self) -> tuple[Maps, Int64[Tensor, "rows"]]:
        """Of all training images, or of `data.images` of them, and their numbers in an order that is the seed's."""
        order = torch.randperm(len(self.data.train), generator=generator(self.seed, "dense images"))
        order = order[: self.protocol.data.images]
        rows = order.sort().values
        return self.maps("train", rows), torch.searchsorted(rows, order)

    def counting(self, what: str, of: int) -> Any:
        return counting(f"{self.title}: {what}", of, not self.quiet)


def run(
    protocol: FrozenDense, weights: str, seed: int, folder: Path | None, title: str = "", quiet: bool = False
) -> Outcome:
    """Maps, then the task. After a stop the same call continues with the maps that are stored."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"task {protocol.task} runs in one process: start it without torchrun")
    began = time.monotonic()
    values, selection, validation, tested = TASKS[protocol.task](Task(protocol, weights, seed, title, quiet))
    return Outcome(values, selection, validation, time.monotonic() - began, tested)


Found = tuple[dict[str, float], str, float | None, dict[str, Tensor]]


# ----------------------------------------------------------------------------------------------------- linear


def linear(task: Task) -> Found:
    """A 1 × 1 convolution on the maps. Interpolation is linear, so one on interpolated maps is the same as logistic
    regression on pixels: it is trained on pixels drawn alike from all training images, every setting in the same
    products, and chosen by the accuracy on the pixels of validation images."""
    settings, (train, rows) = task.protocol.probe, task.training_maps()
    if task.data.val is not None:
        validation = pixels(task, task.maps("val"), torch.arange(len(task.data.val)), settings.pixels // 4)
    else:
        held = max(1, round(task.protocol.data.validation * len(rows)))
        if held >= len(rows):
            raise ConfigError(
                f"all {len(rows)} training images are held out to choose on: lower data.validation, or give more images"
            )
        validation, rows = pixels(task, train, rows[:held], settings.pixels // 4), rows[held:]
    features, labels = pixels(task, train, rows, settings.pixels)
    with task.counting("linear", 1) as progress:
        options = probe.ProbeOptions(task.seed, validation=validation, progress=progress)
        found = fit(task, features, labels, options)
    weight, bias = found.weight.float(), found.bias.float()
    scores = lambda maps: torch.einsum("ndhw,dc->nchw", maps, weight) + bias[:, None, None]
    values = segmentation_metrics(tested(task, task.maps("test"), lambda maps: {"": scores(maps)})[""])
    chosen = ", ".join(f"{name} = {value:g}" for name, value in found.chosen.items())
    best = max(candidate.value for candidate in found.tried if candidate.value == candidate.value)
    return (
        values,
        f"{chosen}, best on pixels of validation images",
        best,
        {
            "weight": weight.T.contiguous(),
            "bias": bias.contiguous(),
        },
    )


def fit(task: Task, features: Tensor, labels: Tensor, options: probe.ProbeOptions) -> probe.Probe:
    settings, none = task.protocol.probe, features[:1]
    if settings.solver == "lbfgs":
        return probe.linear_probe(features, labels, none, l2=settings.l2, options=options)
    schedule = (settings.lr, settings.weight_decay, settings.epochs, settings.batch_size, "cosine")
    sgd = probe.Sgd(*schedule, first=settings.first)
    return probe.sgd_probe(features, labels, none, sgd=sgd, options=options)


def pixels(
    task: Task, maps: Maps, rows: Int64[Tensor, "rows"], count: int
) -> tuple[Float[Tensor, "pixels dim"], Int64[Tensor, "pixels"]]:
    """About `count` pixels, as many of each image."""
    each, found = max(1, count // max(1, len(rows))), []
    for row in rows.tolist():
        draws = generator(task.seed, "dense pixels", row)
        found.append(patches.pixels_of(maps.of(slice(row, row + 1)), maps.labels(row)[None], each, draws))
    if not sum(len(labels) for _, labels in found):
        raise DataError(
            f"no pixel of the {len(rows)} images of {maps.images.images.name} is annotated: check the labels"
        )
    return torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])


def tested(
    task: Task, maps: Maps, scores: Callable[[Scores], dict[Any, Scores]]
) -> dict[Any, Int64[Tensor, "classes classes"]]:
    """The confusion for each of the scores that `scores` gives of a batch of maps, interpolated to the images."""
    counts: dict[Any, Tensor] = {}
    with task.counting("test images", len(maps)) as progress:
        for rows, batch in maps.batches(max(1, QUERIES // (maps.grid[0] * maps.grid[1]))):
            for name, found in scores(batch).items():
                wide = F.interpolate(found, maps.size, mode="bilinear").argmax(1)
                for one, row in zip(wide, rows, strict=True):
                    counts[name] = counts.get(name, 0) + confusion(one, maps.labels(row), task.classes)
            progress(rows[-1] + 1)
    return counts


# ---------------------------------------------------------------------------------------------------- in context


def knn(task: Task) -> Found:
    """Every share, k and temperature is reported; the first k and temperature with the largest share is the table's."""
    settings, (train, order), test = task.protocol.probe, task.training_maps(), task.maps("test")
    matcher = matching.build(settings.matcher)
    values, sizes = dict[str, float](), list[str]()
    for share in sorted(settings.shares, reverse=True):
        memory, shares = labelled_memory(task, train, order[: max(1, round(share * len(order)))])
        if max(settings.k) > len(memory):
            raise ConfigError(f"probe.k {max(settings.k)} is more than the {len(memory)} patches in memory: lower it")

        def scores(maps: Scores) -> dict[tuple[int, float], Scores]:
            queries = F.normalize(maps.flatten(2).transpose(1, 2).flatten(0, 1), dim=1)
            found = patches.in_context(queries, memory, shares, settings.k, settings.temperature, matcher)  # noqa: B023
            as_map = lambda votes: votes.view(len(maps), -1, task.classes).transpose(1, 2).unflatten(2, maps.shape[2:])
            return {key: as_map(votes) for key, votes in found.items()}

        for number, (key, counts) in enumerate(tested(task, test, scores).items()):
            marks = [f"_{share:g}" if share != max(settings.shares) else ""]
            marks += [f"_k{key[0]}_t{key[1]:g}" if number else ""]
            values |= {f"{name}{''.join(marks)}": value for name, value in segmentation_metrics(counts).items()}
        sizes.append(f"{len(memory)}")
    chosen = (
        f"k = {settings.k[0]}, temperature {settings.temperature[0]:g}, as set; patches in memory: {', '.join(sizes)}"
    )
    return values, chosen, None, {}


def labelled_memory(
    task: Task, maps: Maps, rows: Int64[Tensor, "rows"]
) -> tuple[Float[Tensor, "patches dim"], Float[Tensor, "patches classes"]]:
    """Patches of these images with a label, of unit length, and the shares of their classes; in fp16."""
    each, kept = max(1, task.protocol.probe.memory // len(rows)), []
    with task.counting("memory", len(rows)) as progress:
        for number, row in enumerate(rows.tolist(), start=1):
            shares = patches.patch_labels(maps.labels(row)[None], maps.grid, task.classes)[0].flatten(0, 1)
            features = maps.of(slice(row, row + 1))[0].flatten(1).T
            if each < len(shares):
                drawn = patches.drawn_patches(shares, each, generator(task.seed, "dense memory", row))
                features, shares = features[drawn], shares[drawn]
            labelled = shares.sum(1) > 0
            kept.append((F.normalize(features[labelled], dim=1).half(), shares[labelled].half()))
            progress(number)
    memory, shares = (torch.cat([one[part] for one in kept]) for part in (0, 1))
    if not len(memory):
        raise DataError(
            f"no pixel of the {len(rows)} images of {maps.images.images.name} is annotated: check the labels"
        )
    return memory, shares


# ------------------------------------------------------------------------------------------------------ clusters


def cluster(task: Task) -> Found:
    """k-means on patches of the test images, of unit length. The first number of clusters, matched one to one, is the
    table's."""
    settings, test = task.protocol.probe, task.maps("test")
    draws = generator(task.seed, "dense patches")
    drawn = torch.randperm(len(test.features), generator=draws)[: settings.patches].sort().values
    features = F.normalize(test.features[drawn].float(), dim=1)
    values: dict[str, float] = {}
    wanted = [count or task.classes for count in settings.clusters]
    few = [count for count in wanted if count > len(features)]
    if few and few[0] == wanted[0]:
        raise ConfigError(f"{few[0]} clusters need as many patches, there are {len(features)}: give more test images")
    for number, count in enumerate(count for count in wanted if count not in few):
        centres = patches.centres(features, count, settings.rounds, task.seed)
        counts = torch.zeros(task.classes, count, dtype=torch.int64)
        for row, found in clusters_of(task, test, centres):
            counts += confusion_of_clusters(found, test.labels(row), counts.shape)
        for how in ("hungarian", "majority"):
            merged = patches.merged(counts, patches.assignment(counts, how))
            mark = f"_{how}" if how == "majority" else ""
            mark += f"_{count}" if number else ""
            values |= {f"{name}{mark}": value for name, value in segmentation_metrics(merged).items()}
    left_out = f"; {few} clusters left out, there are {len(features)} patches" if few else ""
    return values, f"no label is used but to name clusters{left_out}", None, {}


def clusters_of(task: Task, maps: Maps, centres: Tensor) -> Iterator[tuple[int, Int64[Tensor, "height width"]]]:
    """(row, the nearest centre of each pixel's patch)"""
    half = centres.square().sum(1) / 2
    with task.counting(f"{len(centres)} clusters", len(maps)) as progress:
        for rows, batch in maps.batches(max(1, QUERIES // (maps.grid[0] * maps.grid[1]))):
            near = torch.einsum("ndhw,cd->nchw", F.normalize(batch, dim=1), centres) - half[:, None, None]
            wide = F.interpolate(near.argmax(1)[:, None].float(), maps.size, mode="nearest-exact")[:, 0].long()
            yield from zip(rows, wide, strict=True)
            progress(rows[-1] + 1)


def confusion_of_clusters(found: Tensor, truth: Tensor, shape: torch.Size) -> Int64[Tensor, "classes clusters"]:
    known = truth != patches.VOID
    pairs = shape[1] * truth[known].long() + found[known]
    return torch.bincount(pairs, minlength=shape[0] * shape[1]).view(shape)


# ------------------------------------------------------------------------------------------------------- objects


def objects(task: Task) -> Found:
    """CorLoc: the share of the images with an object in which the one box that is found overlaps an object's by half.
    Beside it, as `corloc_centre`, that of a box on the middle half of the image's area, which looks at nothing."""
    test, hits, trivial, ious = task.maps("test"), 0, 0, list[float]()
    middle = torch.tensor(MIDDLE).repeat_interleave(2)[None]  # x0 y0 x1 y1
    with task.counting("test images", len(test)) as progress:
        for row in range(len(test)):
            truth = test.images.objects(row)
            boxes = truth.boxes[~truth.crowd & ~truth.difficult]
            progress(row + 1)
            if not len(boxes):
                continue
            height, width = test.images.sizes[row].tolist()
            boxes = boxes / torch.tensor([width, height, width, height])
            ious.append(box_iou(discovery.box_of(mask_of(task, test, row))[None], boxes).max().item())
            hits += ious[-1] >= 0.5
            trivial += box_iou(middle, boxes).max().item() >= 0.5
    if not ious:
        raise DataError(f"no image of {task.data.name} has an object: choose another data.name")
    count = len(ious)
    values = {"corloc": hits / count, "best_iou": sum(ious) / count, "corloc_centre": trivial / count}
    return values, f"{task.protocol.probe.discovery}, no label is used", None, {}


def mask_of(task: Task, maps: Maps, row: int) -> Bool[Tensor, "rows columns"]:
    """The one object that is found in an image."""
    settings, one = task.protocol.probe, maps.of(slice(row, row + 1))[0]
    one = one - one.mean((1, 2), keepdim=True)  # behind a ReLU all cosines are positive: no patch would differ
    if settings.discovery == "lost":
        return discovery.lost(one, settings.seeds)
    return discovery.tokencut(one, settings.threshold)


def saliency(task: Task) -> Found:
    """The mask that is found beside all objects of an image together (every class but the first), means over the images
    that have some. As `…_centre` the same of the box on the middle half of the image's area."""
    test, found = task.maps("test"), dict[str, list[float]]()
    (top, bottom), (left, right) = ([round(end * side) for end in MIDDLE] for side in test.size)
    middle = torch.zeros(test.size, dtype=torch.bool)
    middle[top:bottom, left:right] = True
    with task.counting("test images", len(test)) as progress:
        for row in range(len(test)):
            labels = test.labels(row)
            progress(row + 1)
            known = labels != patches.VOID
            truth = (labels > 0)[known]
            if not truth.any():
                continue
            mask = F.interpolate(mask_of(task, test, row)[None, None].float(), test.size)[0, 0] > 0
            for name, one in (("", mask), ("_centre", middle)):
                for metric, value in discovery.overlap(one[known], truth).items():
                    found.setdefault(f"{metric}{name}", []).append(value)
    if not found:
        raise DataError(f"no image of {task.data.name} has an object: choose another data.name")
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return means, f"{task.protocol.probe.discovery}, no label is used", None, {}


TASKS: dict[str, Callable[[Task], Found]] = {
    "dense_linear": linear,
    "dense_knn": knn,
    "dense_cluster": cluster,
    "objects": objects,
    "saliency": saliency,
}
