"""Which images show the same things, by their regions: the windows of a grid go through a network, are centred and
whitened, and two images score the mean over the regions of each of its best match in the other (chamfer). Whole images
match by layout; windows cannot. Exact, with no more than BUDGET products at a time, and shared among the processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset

from mls.chunks import chunks, rows_within, spaced
from mls.config import AugmentConfig, GridConfig, RegionsConfig
from mls.core.matching import Matches, merge
from mls.data import Source
from mls.data.augment import normalise
from mls.data.crops import SPARE, Box, UnreadableImage, cut_into, reduced, shares
from mls.data.decode import Encoded
from mls.data.loader import in_workers
from mls.distributed import gather, rank, world
from mls.errors import UserError
from mls.models import Backbone, Encoder, Precision
from mls.models.backbones import measuring_norms
from mls.models.finite import finite
from mls.streams import watched

SAMPLE = 2000  # images that the statistics of the features are taken from
BATCH = 64  # images whose windows go through the network together
QUERIES = 64  # images that are compared together
BUDGET = {"cpu": 1 << 22, "cuda": 1 << 28}  # products of regions that exist at once
RIDGE = 1e-3  # of the largest variance, added to all before whitening

Tell = Callable[[str, int, int], None]  # what is worked out, for how many images, of how many


def region_boxes(height: int, width: int, options: GridConfig) -> list[Box]:
    """Square windows, evenly spread, row by row.

    >>> region_boxes(32, 48, RegionsConfig(grid=2, side=0.5))
    [(0, 0, 16, 16), (0, 32, 16, 16), (16, 0, 16, 16), (16, 32, 16, 16)]
    """
    side = max(1, round(options.side * min(height, width)))
    places = [i / (options.grid - 1) for i in range(options.grid)] if options.grid > 1 else [0.5]
    return [(round(y * (height - side)), round(x * (width - side)), side, side) for y in places for x in places]


class RegionWindows(Dataset["UInt8[Tensor, 'windows 3 size size'] | UserError"]):
    """Item i is all windows of the i-th batch of the images `ids`. Of an image that cannot be read they are black: a
    training puts another image in its place, so its neighbours are never asked for."""

    def __init__(self, source: Source, ids: Sequence[int], options: GridConfig) -> None:
        self.source, self.ids, self.options = source, ids, options

    def __len__(self) -> int:
        return -(-len(self.ids) // BATCH)

    def __getitem__(self, number: int) -> UInt8[Tensor, "windows 3 size size"] | UserError:
        ids, options = self.ids[number * BATCH : (number + 1) * BATCH], self.options
        windows = torch.zeros(len(ids), options.grid**2, 3, options.size, options.size, dtype=torch.uint8)
        try:
            for index, place in zip(ids, windows, strict=True):
                self._cut(int(index), place)
        except UserError as error:
            return error
        return windows.flatten(0, 1)

    def _cut(self, index: int, out: UInt8[Tensor, "regions 3 size size"]) -> None:
        try:
            image = Encoded(self.source.read(index))
            boxes = region_boxes(image.height, image.width, self.options)
            factor = image.factor(boxes[0][2] / self.options.size / SPARE)
            pixels = image.pixels(factor)
        except (UnreadableImage, OSError):
            return
        for number, box in enumerate(boxes):
            cut_into(out[number : number + 1], pixels, reduced(box, factor))


@dataclass
class RegionEncoder:
    """A network with the statistics of its region features over a data set."""

    network: nn.Module
    whole: nn.Module  # the same, with the statistics of its training: for whole images
    augment: AugmentConfig
    options: GridConfig
    device: torch.device
    workers: int
    mean: Float[Tensor, "features"]
    projection: Float[Tensor, "features dim"] | None = None  # to the whitened components

    @classmethod
    @torch.no_grad()
    def fitted(
        cls,
        backbone: Backbone,
        source: Source,
        augment: AugmentConfig,
        options: GridConfig,
        device: torch.device,
        precision: Precision = "fp32",
        workers: int = 0,
    ) -> RegionEncoder:
        """Every process takes the same statistics. Those of batch normalisation are taken anew: a training's are of
        whole images, or of both."""
        copied = lambda: Encoder(copy.deepcopy(backbone), nn.Identity(), precision).to(device)
        network = copied()
        whole = copied().eval() if isinstance(options, RegionsConfig) and options.novelty else network
        encoder = cls(
            network, whole, augment, options, device, workers, torch.zeros(backbone.feature_dim, device=device)
        )
        sample = spaced(len(source), SAMPLE)
        if measuring_norms(network):
            for _ in encoder.features(source, sample):
                pass
        network.eval()
        features = torch.cat(list(encoder.features(source, sample)))
        encoder.mean = features.mean(dim=0)
        encoder.projection = whitening(features - encoder.mean, options.whiten) if options.whiten else None
        return encoder

    def features(self, source: Source, ids: Sequence[int]) -> Iterator[Float[Tensor, "windows features"]]:
        return self._through(self.network, source, ids, self.options)

    def _through(
        self, network: nn.Module, source: Source, ids: Sequence[int], options: GridConfig
    ) -> Iterator[Float[Tensor, "windows features"]]:
        grey = self.augment.grey == 1  # then it has never seen a colour
        for windows in in_workers(RegionWindows(source, ids, options), self.workers):
            features = network(normalise(windows, self.augment, self.device, grey))[0]
            yield finite(features, f"the features of regions of {source.name}")

    @torch.no_grad()
    def whole_images(self, source: Source, ids: Sequence[int]) -> Float[Tensor, "images features"]:
        """Of unit length."""
        options = replace(self.options, grid=1, side=1.0, size=self.augment.size)
        return F.normalize(torch.cat(list(self._through(self.whole, source, ids, options))), dim=1)

    @torch.no_grad()
    def __call__(
        self, source: Source, ids: Sequence[int], tell: Tell = lambda what, done, of: None
    ) -> Float[Tensor, "images regions dim"]:
        """Centred, whitened, of unit length."""
        parts, done = [], 0
        for features in self.features(source, ids):
            features = features - self.mean
            features = features if self.projection is None else features @ self.projection
            parts.append(F.normalize(features, dim=1).unflatten(0, (-1, self.options.grid**2)))
            done += len(parts[-1])
            tell("regions", done, len(ids))
        return torch.cat(parts)


def whitening(features: Float[Tensor, "rows features"], components: int) -> Float[Tensor, "features components"]:
    """Centred rows times this have uncorrelated columns of variance 1 (but for the ridge): the first principal ones."""
    wide = features.double().cpu()
    variances, directions = torch.linalg.eigh(wide.T @ wide / len(wide))
    variances, directions = variances.flip(0)[:components], directions.flip(1)[:, :components]
    return (directions / (variances + RIDGE * variances[0]).sqrt()).to(features)


def chamfer(
    queries: Float[Tensor, "batch regions dim"], images: Float[Tensor, "rows others dim"]
) -> Float[Tensor, "batch rows"]:
    """The mean over a query's regions of the best cosine in an image, and the same from the image's side.

    >>> chamfer(torch.eye(3)[None], torch.eye(3)[None, [0, 1, 1]])
    tensor([[1.6667]])
    """
    products = queries.flatten(0, 1) @ images.permute(2, 1, 0).flatten(1)
    products = products.view(*queries.shape[:2], images.shape[1], len(images))  # [batch, regions, others, rows]
    return products.amax(dim=2).mean(dim=1) + products.amax(dim=1).mean(dim=1)


@torch.no_grad()
def nearest_images(
    features: Float[Tensor, "images regions dim"],
    ids: Int64[Tensor, "queries"],
    count: int,
    tell: Tell,
    whole: Float[Tensor, "images features"] | None = None,
    weight: float = 0.0,
) -> Matches:
    """For each of the images `ids` the `count` other images of the highest score, best first; of which `weight` times
    the cosine of the `whole` images is taken off."""
    images, regions = features.shape[:2]
    size = rows_within(BUDGET[features.device.type], QUERIES * regions**2)
    found = []
    for number, some in enumerate(ids.split(QUERIES)):
        best: Matches | None = None
        for part in chunks(images, size):
            scores = chamfer(features[some], features[part])
            if whole is not None:
                scores -= weight * whole[some] @ whole[part].T
            numbers = torch.arange(part.start, part.stop, device=ids.device)
            scores = scores.masked_fill(some[:, None] == numbers, -torch.inf)
            top = scores.topk(min(count, len(numbers)), dim=1)
            matches = Matches(top.indices + part.start, top.values)
            best = matches if best is None else merge(best, matches, count)
        assert best is not None
        found.append(best)
        tell("neighbours", min((number + 1) * QUERIES, len(ids)), len(ids))
    return Matches(torch.cat([one.indices for one in found]), torch.cat([one.scores for one in found]))


@torch.no_grad()
def relative_spread(features: Float[Tensor, "images regions dim"], whole: Float[Tensor, "images features"]) -> float:
    """The standard deviation of scores over that of cosines of whole images, mean over a few images of each one's with
    SAMPLE others."""
    some, others = spaced(len(whole), 32), spaced(len(whole), SAMPLE)
    size = rows_within(BUDGET[features.device.type], len(some) * features.shape[1] ** 2)
    parts = [others[part.start : part.stop] for part in chunks(len(others), size)]
    scores = torch.cat([chamfer(features[some], features[part]) for part in parts], dim=1)
    return float((scores.std(dim=1) / (whole[some] @ whole[others].T).std(dim=1)).mean())


def features_of_all(
    encoders: Sequence[RegionEncoder], source: Source, tell: Tell
) -> tuple[Float[Tensor, "images regions dim"], Int64[Tensor, "share"]]:
    """Each process works out its share; and which images these are, the last ones maybe repeated. Of several encoders
    side by side, so that a product of two regions is the mean of their cosines."""
    share = -(-len(source) // world())
    own = torch.arange(rank() * share, (rank() + 1) * share).clamp(max=len(source) - 1)

    def by(number: int, encoder: RegionEncoder) -> Float[Tensor, "images regions dim"]:
        return encoder(source, own.tolist(), lambda what, done, of: tell(what, number * of + done, len(encoders) * of))

    features = side_by_side([by(number, encoder) for number, encoder in enumerate(encoders)])
    return gather([features])[0][: len(source)], own


def side_by_side(features: Sequence[Tensor]) -> Tensor:
    """Of unit length where each is."""
    return torch.cat([*features], dim=-1) / math.sqrt(len(features))


def neighbours_of_all(
    encoders: Sequence[RegionEncoder], source: Source, options: RegionsConfig, tell: Tell
) -> tuple[Matches, Float[Tensor, "images regions dim"]]:
    """For each image of a data set those of the highest score; and the features of all. Each process does its share."""
    images = len(source)
    features, own = features_of_all(encoders, source, tell)
    count, whole, weight = min(options.neighbours, images - 1), None, 0.0
    if options.novelty:
        (whole,) = gather([side_by_side([one.whole_images(source, own.tolist()) for one in encoders])])
        whole = whole[:images]
        weight = options.novelty * relative_spread(features, whole)
    found = nearest_images(features, own.to(features.device), count, tell, whole, weight)
    indices, scores = gather([found.indices, found.scores])
    return Matches(indices[:images], scores[:images]), features


def due(step: int, steps_per_epoch: int, warmup_epochs: float, every_epochs: int) -> bool:
    """Is it the step of the warm-up's end, or one of those after it at which all images are gone through anew?"""
    since, every = step - 1 - math.floor(warmup_epochs * steps_per_epoch), every_epochs * steps_per_epoch
    return since == 0 or (since > 0 and every > 0 and since % every == 0)


def most_alike(
    features: Float[Tensor, "images regions dim"], neighbours: Int64[Tensor, "images neighbours"]
) -> Int64[Tensor, "watched neighbours 2"]:
    """For people, of the `watched` images and each of their neighbours the two regions of the highest product."""
    found = []
    for query in watched(len(features)):
        products = torch.einsum("rd,nsd->nrs", features[query], features[neighbours[query]])
        found.append(torch.stack(torch.unravel_index(products.flatten(1).argmax(1), products.shape[1:]), dim=1))
    return torch.stack(found)


def best_pairs(
    query: Float[Tensor, "regions dim"], image: Float[Tensor, "others dim"], count: int
) -> list[tuple[int, int, float]]:
    """Regions of two images that are each other's best match, best first: for people to look at.

    >>> best_pairs(torch.eye(3), torch.eye(3)[[2, 0, 0]], count=3)
    [(0, 1, 1.0), (2, 0, 1.0)]
    """
    products = query @ image.T
    there, back = products.argmax(dim=1), products.argmax(dim=0)
    mutual = [(i, int(j), float(products[i, j])) for i, j in enumerate(there) if int(back[j]) == i]
    return sorted(mutual, key=lambda pair: -pair[2])[:count]


def box_shares(height: int, width: int, options: GridConfig) -> list[tuple[float, float, float, float]]:
    """The windows as x0 y0 x1 y1 in shares of the image's width and height."""
    return [shares(box, height, width) for box in region_boxes(height, width, options)]
