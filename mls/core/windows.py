"""InfoNCE between small windows of images, a term beside any method that has a pair of encoders, with projection heads
of its own. A window's key is a second cut at its place, its negatives are the keys of all other windows of the batch:
those of its own image, too, so that what the image has in common does not help.

    loss = -log( exp(u1.u2 / t) / sum over all keys v of exp(u1.v / t) )        u, v [batch · windows, projection]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mls.config import ModelConfig, WindowsConfig
from mls.data import ViewPlan, Views
from mls.distributed import gather, rank
from mls.models import Encoder, EncoderPair
from mls.models.heads import projection_head
from mls.models.norm import KeyNorm
from mls.streams import initialisation


class WindowTerm(nn.Module):
    def __init__(self, options: WindowsConfig, model: ModelConfig, features: int, seed: int) -> None:
        super().__init__()
        self.options = options
        with initialisation(seed, "window head"):
            head = projection_head(features, model.hidden or features, model.projection, model.head_norm)
        self.heads = EncoderPair(head)

    def added_to(self, plan: ViewPlan) -> ViewPlan:
        """The method's views, then the windows."""
        wanted = self.options
        return plan.with_window_pairs(wanted.count, wanted.size, wanted.scale, wanted.jitter)

    def forward(
        self, pair: EncoderPair[Encoder], key_norm: KeyNorm, views: Views, order: Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "windows features"], Float[Tensor, "windows projection"], float]:
        """The loss, the features that it comes from, u1, and the loss of a network that cannot tell anything from
        anything."""
        count, options = self.options.count, self.options
        first, second = torch.cat(views.images[-2 * count : -count]), torch.cat(views.images[-count:])
        features, projection = pair.query(first, self.heads.query)
        u1 = F.normalize(projection, dim=1)
        with torch.no_grad():
            (u2,) = key_norm(lambda images: pair.key(images, self.heads.key)[1:], second, order)
            keys, owners = gather([F.normalize(u2, dim=1), views.ids.repeat(count)])  # of all processes
        own = torch.arange(len(u1), device=u1.device) + rank() * len(u1)
        logits = u1 @ keys.T / options.temperature  # [windows, all windows]
        if not options.same_image:
            others = own[:, None] != torch.arange(len(owners), device=own.device)
            logits = logits.masked_fill(others & (owners[own, None] == owners), -torch.inf)
        chance = math.log(len(keys) - (0 if options.same_image else count - 1))
        return F.cross_entropy(logits, own), features, u1, chance
