"""`mls regions`: which images of a data set show the same things, by their regions; lists of neighbours to take
pseudo-labels from, and pictures of the regions that matched and of those that are a visual word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

    from mls.config import AugmentConfig, Config, GridConfig, MLSOptions, RegionsConfig, WordsOptions
    from mls.core.neighbour_lists import NeighbourLists
    from mls.data import Source
    from mls.engine import Run
    from mls.frozen.match_picture import Pixels, RegionPair
    from mls.models import Backbone

QUERIES, SHOWN, PAIRS = 6, 4, 3  # lines of the picture, images in a line, regions of an image
WORDS, OF_A_WORD = 16, 12  # lines of the picture of words, regions in a line
DEPTHS, ASKED = (1, 5, 20), 2000  # neighbours and images whose labels are compared
NOT_OPTIONS = ("lists", "every_epochs", "choose", "soft")  # keys that say nothing of how neighbours are found


def regions(
    weights: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="What `mls neighbours` takes.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of objective.regions: grid=4 size=64.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Folder, list, COCO, VOC, shards or scenes; default: the run's data.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN|WEIGHTS", help="Another network: cosines of regions are averaged. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lists; default: neighbours.safetensors in RUN or $MLS_RUNS."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw which region matched which, for some images.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw regions of a run's visual words, and do nothing else.")
    ] = None,
    cost: Annotated[
        int | None, typer.Option(metavar="IMAGES", min=16, help="What a RECIPE would cost on so many; nothing is run.")
    ] = None,
) -> None:
    """Write, for each image, the images whose regions match its own, for `objective.labels_from=regions`.

    Windows of a grid go through the network, are centred and whitened; two images score the mean of their windows' best
    matches, both ways. Where the data have labels it is printed how often neighbours share them: only for people.

    Examples:

        mls regions runs/my-run --picture pairs.png

        mls regions torchvision:resnet50 size=96 --dataset /data/coco --out coco.safetensors

        mls pretrain mls_regions_scenes_tiny objective.regions.lists=runs/my-run/neighbours.safetensors

        mls regions mls_regions_coco_r50 --cost 118287

        mls regions runs/my-run --also runs/other-seed grid=5 side=0.35 --out of-two.safetensors

        mls regions runs/with-words --words words.png
    """
    if cost is not None:
        return _tell_cost(weights, options or [], cost)
    if words is not None:
        return _draw_words(weights, words)
    _write_lists([weights, *(also or [])], options or [], dataset, out, picture)


def _write_lists(
    names: list[str], options: list[str], dataset: str | None, out: Path | None, picture: Path | None
) -> None:
    from mls.files import check_picture, place_for, save_picture
    from mls.frozen.match_picture import draw_pairs

    check_picture(picture or Path("pairs.png"))
    wanted, source = _given(names[0], options, dataset)
    teachers = [_teacher(name) for name in names]
    lists, features = _neighbours(teachers, wanted, source)
    file = place_for("neighbours.safetensors", out, teachers[0].name)
    lists.save(file)
    print(f"{file}: {lists.ids.shape[1]} neighbours of each of {len(source):,} images, by {wanted.grid**2} regions")
    if source.labels is not None:
        print(_overlap(source.labels, lists))
    if picture is not None:
        save_picture(draw_pairs(_pairs(source, wanted, lists, features)), picture.expanduser())
        print(picture)


def _tell_cost(recipe: str, overrides: list[str], images: int) -> None:
    from mls.config import MLSOptions, WordsOptions
    from mls.engine.sizing import Facts, choose
    from mls.errors import ConfigError
    from mls.recipes import load_config
    from mls.tables import print_table

    config = load_config(recipe, overrides)
    if config.run.auto:  # as on a GPU of 80 GiB with photographs of 480 pixels
        config, _ = choose(config, Facts(images, 480, 80.0))
    options = config.objective
    if not isinstance(options, (MLSOptions, WordsOptions)) or getattr(options, "labels_from", "regions") != "regions":
        raise ConfigError(f"{recipe} has no labels from regions: name a recipe such as mls_regions_coco_r50")
    print_table([f"{recipe}, {images:,} images", "computed"], costs(config, options, images))


def costs(config: Config, objective: MLSOptions | WordsOptions, images: int) -> list[list[str]]:
    """By the pixels that go through the network, where a backward pass is two forward ones, and by the sizes of what is
    kept."""
    from mls.config import RegionsConfig, WordsOptions
    from mls.core.regions import SAMPLE
    from mls.models import backbones

    options, windows = objective.regions, objective.windows
    pixels = lambda size: (size / config.augment.size) ** 2  # of a crop
    step = 4 * (1 + windows.count * pixels(windows.size))  # forward passes: the query's and backward, the key's
    rest, every = config.optim.epochs - objective.warmup_epochs, options.every_epochs
    from_file = isinstance(options, RegionsConfig) and options.lists
    rounds = 0 if from_file or rest <= 0 else 1 + (math.ceil(rest / every) - 1 if every else 0)
    a_round = options.grid**2 * pixels(options.size) * (1 + 2 * min(SAMPLE, images) / images)
    width = options.whiten or backbones.build(config.model.backbone).feature_dim
    return [
        ["a step, over one without windows", f"{step / 4:.2f} times"],
        ["times that all regions are gone through", f"{rounds}, {a_round:.2f} forward passes of the images each"],
        ["  share of all forward and backward passes", f"{rounds * a_round / (step * config.optim.epochs):.1%}"],
        ["features of all regions, while they are compared", _megabytes(4 * images * options.grid**2 * width)],
        *(_of_words(objective, images) if isinstance(objective, WordsOptions) else _of_lists(config, images)),
    ]


def _of_words(objective: WordsOptions, images: int) -> list[list[str]]:
    from mls.core.methods.words import LARGEST

    kept = _megabytes(8 * images * min(LARGEST, objective.words))
    return [["bags of words, on each GPU and in every checkpoint", kept]]


def _of_lists(config: Config, images: int) -> list[list[str]]:
    from mls.config import MLSOptions
    from mls.core.regions import BUDGET

    assert isinstance(config.objective, MLSOptions)
    kept = min(config.objective.regions.neighbours, images - 1)
    return [
        ["products that exist at once, on a GPU", _megabytes(4 * BUDGET["cuda"])],
        ["lists, on each GPU and in every checkpoint", _megabytes(6 * images * kept)],
        ["neighbours among the dictionary's rows, of an image", f"{kept * config.dictionary.size / images:.1f}"],
    ]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


class Teacher(NamedTuple):
    name: str  # of the weights; the folder of a run
    backbone: Backbone
    augment: AugmentConfig

    @property
    def identity(self) -> dict[str, Any]:
        from mls.frozen.features import hash_of_weights

        augment = self.augment
        statistics = {"mean": [*augment.mean], "std": [*augment.std], "grey": augment.grey == 1}
        return {"weights": hash_of_weights(self.backbone), "name": self.name, **statistics}


def _teacher(weights: str) -> Teacher:
    from mls.frozen.neighbours import Embedder
    from mls.models import load_backbone

    run = _run(weights)
    if run is not None:
        return Teacher(str(run.path), load_backbone(str(run.path)), run.config.augment)
    embedder = Embedder.of(weights)
    return Teacher(weights, embedder.network, embedder.augment)  # pyright: ignore[reportArgumentType]


def _run(weights: str) -> Run | None:
    from mls.engine import Run
    from mls.errors import UserError

    try:
        return Run.open(weights)
    except UserError:
        return None


def _neighbours(
    teachers: Sequence[Teacher], options: RegionsConfig, source: Source
) -> tuple[NeighbourLists, Float[Tensor, "images regions dim"]]:
    """The lists with all that they follow from, and the features of all regions."""
    from mls.core.neighbour_lists import NeighbourLists
    from mls.core.regions import RegionEncoder, most_alike, neighbours_of_all
    from mls.data.loader import worker_count
    from mls.data.sources import hash_of_images
    from mls.distributed import start
    from mls.progress import counting

    workers = worker_count(None) if len(source) > 2000 else 0
    fitted = lambda one: RegionEncoder.fitted(
        one.backbone, source, one.augment, options, start().device, workers=workers
    )
    encoders = [fitted(teacher) for teacher in teachers]
    regions = len(teachers) * len(source)
    with counting(f"regions of {source.name}", regions + len(source)) as advance:
        tell = lambda what, done, of: advance(done + regions * (what == "neighbours"))
        found, features = neighbours_of_all(encoders, source, options, tell)
    keys = {key: value for key, value in asdict(options).items() if key not in NOT_OPTIONS}
    first, *others = (teacher.identity for teacher in teachers)
    identity = {"images": hash_of_images(source), **keys, **first} | ({"also": others} if others else {})
    return NeighbourLists.of(found, identity, most_alike(features, found.indices)), features.cpu()


def _given(weights: str, options: list[str], dataset: str | None) -> tuple[RegionsConfig, Source]:
    """Of a run what its configuration says; of other weights the defaults."""
    from mls.config import MLSOptions, RegionsConfig, WordsOptions
    from mls.errors import ConfigError
    from mls.recipes import load_config
    from mls.tools.neighbours import weights_and_source

    _, source = weights_and_source(weights, dataset)
    run = _run(weights)
    objective = None if run is None else run.config.objective
    own = asdict(objective.regions if isinstance(objective, (MLSOptions, WordsOptions)) else RegionsConfig())
    before = [f"objective.regions.{key}={value}" for key, value in own.items() if key not in NOT_OPTIONS]
    given = load_config("mls_coco_r50", [*before, *(f"objective.regions.{option}" for option in options)])
    if given.run.auto:
        raise ConfigError(f"{given.run.auto[0]}=auto is for a run, which is sized to its images: give a number")
    assert isinstance(given.objective, MLSOptions)
    return given.objective.regions, source


def _overlap(labels: Tensor, lists: NeighbourLists) -> str:
    """How well the true labels of neighbours agree, beside chance."""
    import torch

    from mls.monitor.labels import label_quality

    asked = torch.arange(0, len(labels), max(1, len(labels) // ASKED))
    found = {}
    for depth in (depth for depth in DEPTHS if depth <= lists.ids.shape[1]):
        found[depth] = label_quality(labels, asked, lists.ids[asked, :depth].long(), asked)
    words = ", ".join(f"{values['labels/overlap']:.3f} of the first {depth}" for depth, values in found.items())
    chance = next(iter(found.values()))["labels/overlap_chance"]
    return f"overlap of true labels: {words}; by chance {chance:.3f}"


def _pairs(
    source: Source, options: RegionsConfig, lists: NeighbourLists, features: Float[Tensor, "images regions dim"]
) -> list[list[RegionPair]]:
    """Of the images that can be read."""
    from mls.core.regions import best_pairs, box_shares
    from mls.data.unreadable import MOST, Unreadable, decoded
    from mls.frozen.match_picture import RegionPair

    unreadable = Unreadable(len(source), MOST)

    def of(query: int, image: int, score: float) -> RegionPair | None:
        found = decoded(source, [query, image], unreadable)
        if len(found) < 2:
            return None
        first, second = (found[number].permute(1, 2, 0).contiguous().numpy() for number in (query, image))
        here, there = (box_shares(one.shape[0], one.shape[1], options) for one in (first, second))
        pairs = [(here[i], there[j]) for i, j, _ in best_pairs(features[query], features[image], PAIRS)]
        shared = None if source.labels is None else bool((source.labels[query] * source.labels[image]).any())
        return RegionPair(first, second, pairs, score, shared)

    numbers = range(0, len(source), max(1, len(source) // QUERIES))[:QUERIES]
    neighbours = lambda one: zip(lists.ids[one, :SHOWN].tolist(), lists.scores[one, :SHOWN].tolist(), strict=True)
    lines = [[of(number, image, score) for image, score in neighbours(number)] for number in numbers]
    return [drawn for line in lines if (drawn := [pair for pair in line if pair is not None])]


def _draw_words(weights: str, file: Path) -> None:
    """As the last clustering of the run left them."""
    from mls.config import WordsOptions
    from mls.data.sources import build_source
    from mls.engine import Run
    from mls.engine.checkpoint import Checkpoints
    from mls.engine.images import accept_other_images
    from mls.errors import UserError
    from mls.files import check_picture, save_picture
    from mls.frozen.match_picture import draw_words

    check_picture(file)
    run = Run.open(weights)
    config, source = run.config, build_source(run.config.data)
    state = Checkpoints(run.checkpoints, config.engine.keep_last).newest()
    bags = {} if state is None else state["method"].get("_extra_state", {}).get("bags", {})
    if state is None or not isinstance(config.objective, WordsOptions) or "clusters" not in bags:
        when = "objective.method=mls_words finds them at the end of objective.warmup_epochs"
        raise UserError(f"{run.path} has no visual words of its own: {when}")
    accept_other_images(run.path, state, source, accept=False)
    options = config.objective.regions
    if cut := bags.get("cut"):  # a branch's may be another grid than that of the words it began with
        options = replace(options, grid=cut[0], side=cut[1])
    save_picture(draw_words(examples_of_words(source, options, bags["clusters"])), file.expanduser())
    print(file)


def examples_of_words(
    source: Source, options: GridConfig, clusters: Int64[Tensor, "points"]
) -> list[tuple[str, list[Pixels]]]:
    """Some words, from the most frequent to the rarest, and some regions of each, of the images that can be read."""
    from mls.chunks import spaced
    from mls.core.methods.words import CLUSTERED
    from mls.core.regions import region_boxes
    from mls.data.unreadable import MOST, Unreadable, decoded

    images, of_an_image, unreadable = spaced(len(source), CLUSTERED), options.grid**2, Unreadable(len(source), MOST)
    counts = clusters.bincount()
    used = counts.argsort(descending=True)[: int((counts > 0).sum())].tolist()
    found = []
    for word in (used[place] for place in spaced(len(used), WORDS)):
        points = (clusters == word).nonzero()[:, 0]
        shown = []
        for point in points[spaced(len(points), OF_A_WORD)].tolist():
            for pixels in decoded(source, [images[point // of_an_image]], unreadable).values():
                boxes = region_boxes(pixels.shape[1], pixels.shape[2], options)
                y, x, height, width = boxes[point % of_an_image]
                shown.append(pixels[:, y : y + height, x : x + width].permute(1, 2, 0).contiguous().numpy())
        found.append((f"word {word}, {counts[word] / len(clusters):.1%}", shown))
    return found
