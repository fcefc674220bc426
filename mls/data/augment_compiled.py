"""`engine.compile` beside a GPU that augments: what augment.apply does, worked out for every sample and kept where it
concerns it, so that no shape depends on what is drawn and torch.compile makes a few kernels of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad

from mls.config import AugmentConfig
from mls.data.augment import (
    OPERATIONS,
    Augment,
    Parameters,
    bell,
    blur_radius,
    blur_weights,
    colour_matrices,
    hash_steps,
    luminance,
    smooth,
    standardise,
    to_float,
    turn_hue,
)


@dataclass
class Numbers:
    """Parameters as numbers for each sample; an operation that does not concern it has those that change nothing."""

    matrices: Float[Tensor, "batch 4 3 3"]
    towards_mean: Float[Tensor, "batch 4"]
    hue_turns: Float[Tensor, "batch 4"]  # by slot; 0 where it is another operation's
    grey: Float[Tensor, "batch 1"]
    blur: Float[Tensor, "batch taps"]
    flip: Float[Tensor, "batch 1"]
    noise: Float[Tensor, "batch 1"]

    @classmethod
    def of(cls, parameters: Parameters, radius: int) -> Numbers:
        matrices, towards_mean = colour_matrices(parameters)
        jitter = parameters.jitter[:, None]
        is_hue = (parameters.order == OPERATIONS.index("hue")) & jitter
        weights = blur_weights(parameters.sigma, radius)
        as_it_is = torch.eye(1, radius + 1)  # the middle alone
        return cls(
            matrices=torch.where(jitter[..., None, None], matrices, torch.eye(3)),
            towards_mean=torch.where(jitter, towards_mean, 0.0),
            hue_turns=torch.where(is_hue, parameters.hue[:, None], 0.0),
            grey=parameters.grey[:, None].float(),
            blur=torch.where(parameters.blur[:, None], weights, as_it_is),
            flip=parameters.flip[:, None].float(),
            noise=parameters.noise[:, None],
        )

    def to(self, device: torch.device) -> Numbers:
        """In one copy."""
        parts = [getattr(self, field.name) for field in fields(self)]
        together = torch.cat([part.flatten(1) for part in parts], dim=1).to(device, non_blocking=True)
        split = together.split([part[0].numel() for part in parts], dim=1)
        return Numbers(*(one.view(part.shape) for one, part in zip(split, parts, strict=True)))


def augmented(
    crops: UInt8[Tensor, "batch 3 height width"],
    numbers: Numbers,
    hashed: tuple[Int64[Tensor, "batch"], Int64[Tensor, "pixels"]] | None,  # keys and steps; None: there is no noise
    config: AugmentConfig,
    views: Float[Tensor, "batch 3 height width"],
) -> None:
    """Into `views`, of whatever type and layout they are."""
    images = to_float(crops)
    for slot in range(len(OPERATIONS)):
        matrix = numbers.matrices[:, slot, :, :, None, None]
        to_mean = numbers.towards_mean[:, slot, None, None, None] * luminance(images.mean(dim=(2, 3), keepdim=True))
        mixed = sum(images[:, channel, None] * matrix[:, :, channel] for channel in range(3)) + to_mean
        images = torch.clamp(torch.as_tensor(mixed), 0, 1)
        turns = numbers.hue_turns[:, slot]
        images = torch.where(turns[:, None, None, None] != 0, turn_hue(images, turns), images)
    images = torch.where(_flag(numbers.grey), luminance(images), images)
    radius = numbers.blur.shape[1] - 1
    if radius > 0:
        weights = numbers.blur[:, :, None, None, None]
        images = smooth(pad(images, (radius, radius, 0, 0), mode="reflect"), weights, radius, dim=3)
        images = smooth(pad(images, (0, 0, radius, radius), mode="reflect"), weights, radius, dim=2)
    images = torch.where(_flag(numbers.flip), images.flip(3), images)
    if hashed is not None:
        keys, steps = hashed
        images = (images + numbers.noise[..., None, None] * bell(keys[:, None] + steps).view(images.shape)).clamp(0, 1)
    views.copy_(standardise(images, config))


def _flag(values: Float[Tensor, "batch 1"]) -> Tensor:
    return values[..., None, None] != 0


class CompiledAugment(Augment):
    def _finish(self, views: Tensor, crops: Tensor, parameters: Parameters) -> None:
        radius = blur_radius(self.config, *crops.shape[2:]) if self.config.blur else 0
        numbers = Numbers.of(parameters, radius).to(crops.device)
        keys = parameters.noise_key.to(crops.device, non_blocking=True)
        hashed = (keys, hash_steps(crops[0].numel(), crops.device)) if self.config.noise else None
        program()(crops, numbers, hashed, self.config, views)


@cache
def program() -> Callable[..., None]:
    return torch.compile(augmented, fullgraph=True, dynamic=False)
