"""Multi-label pseudo-targets over visual words instead of over the dictionary's rows: the regions of all images, as
the run's own key encoder sees them, are clustered; which words an image's regions are is what each of its crops must
tell, beside InfoNCE. After BoWNet (https://arxiv.org/abs/2002.12247), with windows for cells and the run for a teacher.

    bag[i, w]  = mean over image i's regions r of softmax over words(cos(r, w) / sharpness)
    loss       = - sum over words of bag · log softmax(SCALE · W g1 + b)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mls.chunks import chunks, spaced
from mls.config import Config, GridConfig, WordsOptions
from mls.core.method import Memory, StepOutput
from mls.core.methods import register
from mls.core.methods.moco import MoCo, Query
from mls.core.queried_rows import QueriedRows
from mls.core.regions import RegionEncoder, Tell, due, features_of_all
from mls.data import Source, Views
from mls.data.loader import worker_count
from mls.data.sources import hash_of_images
from mls.distributed import on_main
from mls.errors import ConfigError
from mls.models import Precision
from mls.streams import generator, initialisation

SCALE = 10.0  # of the feature, which has unit length
CLUSTERED = 8192  # images whose regions make the words
ROUNDS = 25  # of k-means
LARGEST = 128  # words that are kept of an image
TOGETHER = 1024  # images whose regions are given their words together


class Bags:
    """Of each image the words with the largest shares; their shares add up to 1."""

    def __init__(self) -> None:
        self.words: Int64[Tensor, "images kept"] | None = None
        self.shares: Float[Tensor, "images kept"] | None = None
        self.clusters: Int64[Tensor, "points"] | None = None  # of the regions that were clustered
        self.usual: Float[Tensor, "words"] | None = None  # the mean bag
        self.cut: list[float] = []  # how the regions were cut: `regions.grid`, `regions.side`
        self.images = ""  # hash of the data that they are of
        self.device = torch.device("cpu")

    def keep(
        self,
        bags: Float[Tensor, "images words"],
        clusters: Int64[Tensor, "points"] | None,
        images: str,
        cut: GridConfig,
    ) -> None:
        shares, words = bags.topk(min(LARGEST, bags.shape[1]), dim=1)
        self.words, self.shares = words.int(), shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-12)
        self.clusters, self.images, self.usual = clusters, images, bags.mean(dim=0)
        self.cut = [cut.grid, cut.side]
        self.to(self.device)

    def of(self, ids: Int64[Tensor, "batch"], count: int) -> Float[Tensor, "batch words"]:
        assert self.words is not None and self.shares is not None, "`refresh` was not called"
        shares = self.shares[ids]
        return shares.new_zeros(len(ids), count).scatter(1, self.words[ids].long(), shares)

    def tensors(self) -> dict[str, Tensor]:
        named = {"words": self.words, "shares": self.shares, "usual": self.usual, "clusters": self.clusters}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor if name == "clusters" else tensor.to(device))  # k-means is the CPU's work

    def state_dict(self) -> dict[str, Any]:
        copies = {name: tensor.cpu().clone() for name, tensor in self.tensors().items()}
        return {**copies, "images": self.images, "cut": self.cut} if copies else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("words", "shares", "usual", "clusters"):
            setattr(self, name, state.get(name))
        self.images, self.cut = state.get("images", ""), state.get("cut", [])
        self.to(self.device)


@register("mls_words", WordsOptions)
class Words(MoCo):
    term = "words"

    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        self.precision: Precision = precision
        self.options: WordsOptions = cast(WordsOptions, config.objective)
        self.label_windows = self.options.label_windows
        self.truth = image_labels if self.options.pseudo_labels == "oracle" else None
        if self.options.pseudo_labels == "oracle" and image_labels is None:
            raise ConfigError("objective.pseudo_labels=oracle needs images with labels: this source has none")
        self.count = self.options.words if self.truth is None else self.truth.shape[1]
        self.bags = Bags()
        with initialisation(config.run.seed, "words"):
            self.classifier = nn.Linear(self.backbone.feature_dim, self.count)
        self.warming_up = False  # InfoNCE alone; `set_progress` says so
        self.images = ""  # hash of the data, once it is known

    def refuse(self, source: Source) -> None:
        regions = min(len(source), CLUSTERED) * self.options.regions.grid**2
        if self.truth is None and regions < self.count:
            raise ConfigError(
                f"{regions} regions cannot make {self.count} words: lower objective.words to {regions // 10} or so"
            )

    def beside_info_nce(
        self, query: Query, rows: QueriedRows, views: Views, out: StepOutput | None
    ) -> Float[Tensor, ""] | None:
        if self.warming_up or self.bags.words is None:  # DDP waits for a gradient of every parameter
            return 0.0 * (self.classifier.weight.sum() + self.classifier.bias.sum())
        bags = self.bags.of(views.ids, self.count)
        logits = self.classifier(SCALE * query.backbone)
        loss = -(bags * logits.log_softmax(dim=1)).sum(dim=1).mean()
        if out is not None:
            out.scalars["loss/words"] = loss.detach()
            assert self.bags.usual is not None
            one_for_all = self.bags.usual.clamp_min(1e-12).log()
            out.scalars["chance/words"] = -(bags * one_for_all).sum(dim=1).mean()
            out.scalars["floor/words"] = -torch.xlogy(bags, bags).sum(dim=1).mean()  # of a bag told exactly
        return self.options.weight * loss

    def set_progress(self, step: int, epoch: int, steps_per_epoch: int) -> None:
        self.step, self.steps_per_epoch = step, steps_per_epoch
        self.warming_up = step <= self.options.warmup_epochs * steps_per_epoch

    def refresh(self, source: Source, tell: Callable[[str, int, int], None]) -> dict[str, float]:
        options = self.options
        if not self.images:
            self.images = hash_of_images(source)
        # There are none of these images in a resume on others, and where a branch ended the warm-up behind it.
        wanting = self.bags.images != self.images and not self.warming_up
        if not wanting and not due(
            self.step, self.steps_per_epoch, options.warmup_epochs, options.regions.every_epochs
        ):
            return {}
        clusters = self.bags.clusters if self.bags.images == self.images else None
        if self.truth is not None:
            bags = self.truth.float() / self.truth.float().sum(dim=1, keepdim=True).clamp_min(1)
        else:
            bags, clusters = self.of_regions(source, clusters, tell)
        self.bags.keep(bags, clusters, self.images, options.regions)
        usual = self.bags.usual
        assert usual is not None
        return {"words/used": float(torch.exp(-torch.xlogy(usual, usual).sum()))}  # as many of equal share say as much

    @torch.no_grad()
    def of_regions(
        self, source: Source, clusters: Int64[Tensor, "before"] | None, tell: Tell
    ) -> tuple[Float[Tensor, "images words"], Int64[Tensor, "points"]]:
        """`clusters`: those that the regions were in before."""
        config, device = self.config, next(self.parameters()).device
        workers, options = worker_count(config.data.workers), self.options
        encoder = RegionEncoder.fitted(
            self.pair.key.backbone, source, config.augment, options.regions, device, self.precision, workers
        )
        features, _ = features_of_all([encoder], source, tell)
        some = features[spaced(len(source), CLUSTERED)].flatten(0, 1).cpu()
        if clusters is not None and len(clusters) != len(some):  # a branch with another grid
            clusters = None
        centres, clusters = on_main(lambda: clustered(some, self.count, self.stream("words"), clusters))
        bags, directions = features.new_empty(len(features), self.count), centres.to(device).T
        for part in chunks(len(features), TOGETHER):
            bags[part] = (features[part] @ directions / options.sharpness).softmax(dim=2).mean(dim=1)
        if options.pseudo_labels == "random":  # those of another image
            bags = bags[torch.randperm(len(bags), generator=generator(config.run.seed, "other images")).to(device)]
        return bags, clusters

    def stream(self, purpose: str) -> torch.Generator:
        return generator(self.config.run.seed, purpose, self.step)

    def memories(self) -> Mapping[str, Memory]:
        return {**super().memories(), "bags": self.bags}


def clustered(
    points: Float[Tensor, "points dim"],
    count: int,
    stream: torch.Generator,
    clusters: Int64[Tensor, "points"] | None = None,
) -> tuple[Float[Tensor, "count dim"], Int64[Tensor, "points"]]:
    """Centres of unit length by k-means with cosines, and each point's. Begun from the `clusters` that the points were
    in, words keep their numbers, and with them what the classifier has learnt of them. One without points begins anew
    at a point."""
    if clusters is None:
        centres = points[torch.randperm(len(points), generator=stream)[:count]]
        clusters = (points @ centres.T).argmax(dim=1)
    for _ in range(ROUNDS):
        sums = points.new_zeros(count, points.shape[1]).index_add_(0, clusters, points)
        empty = torch.bincount(clusters, minlength=count) == 0
        sums[empty] = points[torch.randperm(len(points), generator=stream)[: int(empty.sum())]]
        centres = F.normalize(sums, dim=1)
        clusters = (points @ centres.T).argmax(dim=1)
    return centres, clusters
