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
from mls.config import Config, WordsOptions
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
LARGEST = 64  # words that are kept of an image
TOGETHER = 1024  # images whose regions are given their words together


class Bags:
    """Of each image the words with the largest shares; their shares add up to 1."""

    def __init__(self) -> None:
        self.words: Int64[Tensor, "images kept"] | None = None
        self.shares: Float[Tensor, "images kept"] | None = None
        self.images = ""  # hash of the data that they are of

    def keep(self, bags: Float[Tensor, "images words"], images: str) -> None:
        self.images = images
        shares, words = bags.topk(min(LARGEST, bags.shape[1]), dim=1)
        self.words, self.shares = words.int(), shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-12)

    def of(self, ids: Int64[Tensor, "batch"], count: int) -> Float[Tensor, "batch words"] | None:
        """None: there are none yet."""
        if self.words is None or self.shares is None:
            return None
        shares = self.shares[ids]
        return shares.new_zeros(len(ids), count).scatter(1, self.words[ids].long(), shares)

    def to(self, device: torch.device | str) -> None:
        self.words, self.shares = (None if one is None else one.to(device) for one in (self.words, self.shares))

    def state_dict(self) -> dict[str, Any]:
        if self.words is None or self.shares is None:
            return {}
        return {"words": self.words.cpu().clone(), "shares": self.shares.cpu().clone(), "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.words, self.shares, self.images = state.get("words"), state.get("shares"), state.get("images", "")


@register("mls_words", WordsOptions)
class Words(MoCo):
    term = "words"

    def __init__(self, config: Config, precision: Precision = "fp32", image_labels: Tensor | None = None) -> None:
        super().__init__(config, precision, image_labels)
        self.precision: Precision = precision
        self.options: WordsOptions = cast(WordsOptions, config.objective)
        self.truth = image_labels if self.options.pseudo_labels == "oracle" else None
        if self.options.pseudo_labels == "oracle" and image_labels is None:
            raise ConfigError("objective.pseudo_labels=oracle needs images with labels: this source has none")
        self.count = self.options.words if self.truth is None else self.truth.shape[1]
        self.bags = Bags()
        with initialisation(config.run.seed, "words"):
            self.classifier = nn.Linear(self.backbone.feature_dim, self.count)
        self.warming_up = False  # InfoNCE alone; `set_progress` says so
        self.images = ""  # hash of the data, once it is known

    def beside_info_nce(
        self, query: Query, rows: QueriedRows, views: Views, out: StepOutput | None
    ) -> Float[Tensor, ""] | None:
        bags = None if self.warming_up else self.bags.of(views.ids, self.count)
        if bags is None:  # DDP waits for a gradient of every parameter
            return 0.0 * (self.classifier.weight.sum() + self.classifier.bias.sum())
        logits = self.classifier(SCALE * query.backbone)
        loss = -(bags * logits.log_softmax(dim=1)).sum(dim=1).mean()
        if out is not None:
            usual = bags.mean(dim=0)
            out.scalars["loss/words"] = loss.detach()
            out.scalars["chance/words"] = -torch.xlogy(usual, usual).sum()  # one answer for all: the batch's mean bag
        return self.options.weight * loss

    def set_progress(self, step: int, epoch: int, steps_per_epoch: int) -> None:
        self.step, self.steps_per_epoch = step, steps_per_epoch
        self.warming_up = step <= self.options.warmup_epochs * steps_per_epoch

    def refresh(self, source: Source, tell: Callable[[str, int, int], None]) -> dict[str, float]:
        options = self.options
        if not self.images:
            self.images = hash_of_images(source)
        others = self.bags.words is not None and self.bags.images != self.images  # those of a resume on other data
        if not others and not due(self.step, self.steps_per_epoch, options.warmup_epochs, options.regions.every_epochs):
            return {}
        bags = self.of_labels(self.truth) if self.truth is not None else self.of_regions(source, tell)
        self.bags.keep(bags, self.images)
        usual = bags.mean(dim=0)
        return {"words/used": float(torch.exp(-torch.xlogy(usual, usual).sum()))}  # as many of equal share say as much

    def of_labels(self, labels: Float[Tensor, "images classes"]) -> Float[Tensor, "images classes"]:
        return labels.float() / labels.float().sum(dim=1, keepdim=True).clamp_min(1)

    @torch.no_grad()
    def of_regions(self, source: Source, tell: Tell) -> Float[Tensor, "images words"]:
        config, device = self.config, next(self.parameters()).device
        workers, options = worker_count(config.data.workers), self.options
        encoder = RegionEncoder.fitted(
            self.pair.key.backbone, source, config.augment, options.regions, device, self.precision, workers
        )
        features, _ = features_of_all(encoder, source, tell)
        some = features[spaced(len(source), CLUSTERED)].flatten(0, 1).cpu()
        centres = on_main(lambda: clustered(some, self.count, self.stream("words"))).to(device)
        bags = features.new_empty(len(features), self.count)
        for part in chunks(len(features), TOGETHER):
            bags[part] = (features[part] @ centres.T / options.sharpness).softmax(dim=2).mean(dim=1)
        if options.pseudo_labels == "random":  # those of another image
            bags = bags[torch.randperm(len(bags), generator=self.stream("other images")).to(device)]
        return bags

    def stream(self, purpose: str) -> torch.Generator:
        return generator(self.config.run.seed, purpose, self.step)

    def memories(self) -> Mapping[str, Memory]:
        return {**super().memories(), "bags": self.bags}


def clustered(points: Float[Tensor, "points dim"], count: int, stream: torch.Generator) -> Float[Tensor, "count dim"]:
    """Centres of unit length by k-means with cosines. A cluster that is left without points begins anew at one."""
    centres = points[torch.randperm(len(points), generator=stream)[:count]]
    for _ in range(ROUNDS):
        nearest = (points @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=count) == 0
        sums[empty] = points[torch.randperm(len(points), generator=stream)[: int(empty.sum())]]
        centres = F.normalize(sums, dim=1)
    return centres
