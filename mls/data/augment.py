"""On the training device: uint8 crops become normalised views, a whole batch at a time with parameters per sample.
`draw` says what happens to each sample (a pure function of seed, epoch, id and view), `apply` does it; beside a CPU the
workers have done all but noise and normalisation (augment_uint8.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from mls.chunks import chunks, rows_within
from mls.config import AugmentConfig, EngineConfig
from mls.data import Batch, Views
from mls.streams import derive, uniforms

OPERATIONS = ("brightness", "contrast", "saturation", "hue")  # the numbers in Parameters.order
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights
DRAWS = 15
CACHE = 2**19  # values per part on a CPU: what stays in its cache is several times as fast
FAINT = 1e-7  # blur weights below this share of the middle one count as 0


@dataclass
class Parameters:
    """What happens to each sample of one view. On the CPU, so that choosing samples never waits for a GPU."""

    jitter: Bool[Tensor, "batch"]
    order: Int64[Tensor, "batch 4"]
    brightness: Float[Tensor, "batch"]
    contrast: Float[Tensor, "batch"]
    saturation: Float[Tensor, "batch"]
    hue: Float[Tensor, "batch"]
    grey: Bool[Tensor, "batch"]
    blur: Bool[Tensor, "batch"]
    sigma: Float[Tensor, "batch"]
    flip: Bool[Tensor, "batch"]
    noise: Float[Tensor, "batch"]  # standard deviation
    noise_key: Int64[Tensor, "batch"]

    def __getitem__(self, rows: slice | Tensor) -> Parameters:
        return Parameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def noise_alone(self) -> Parameters:
        """What is left to do with a crop that a worker has augmented."""
        never = torch.zeros_like(self.jitter)
        return replace(self, jitter=never, grey=never, blur=never, flip=never)


def in_worker(engine: EngineConfig, device: torch.device) -> bool:
    """Where the views of a run that trains on this device are augmented."""
    return engine.augment == "worker" or (engine.augment == "auto" and device.type == "cpu")


class Augment:
    """Finishes the views of a batch. `draw` with the same arguments tells afterwards what was done, flips too.

    All is computed in float32; `dtype` is what the views are handed over in. With `reuse` views on a CPU are written
    over those of the last batch: fresh memory costs a quarter of a millisecond an image.
    """

    def __init__(
        self,
        config: AugmentConfig,
        seed: int,
        device: torch.device | str,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
        positions: bool = False,  # also hand over which samples were flipped
        reuse: bool = False,
    ) -> None:
        self.kept: dict[int, Tensor] | None = {} if reuse and torch.device(device).type == "cpu" else None  # by view
        self.config, self.seed, self.device, self.dtype = config, seed, torch.device(device), dtype
        self.positions = positions
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Views:
        images, flips = [], []
        for view, crops in enumerate(batch.crops):
            parameters = draw(self.config, self.seed, batch.epoch, batch.ids.numpy(), view)
            crops = crops.to(self.device, non_blocking=True)
            out = self._room(view, crops)
            if not batch.augmented:
                self._finish(out, crops, parameters)
            elif self.config.noise or self.device.type != "cpu":
                self._finish(out, crops, parameters.noise_alone())
            else:
                self._normalise(out, crops)
            images.append(out)
            if self.positions:
                flips.append(parameters.flip.to(self.device, non_blocking=True))
        boxes = [boxes.to(self.device, non_blocking=True) for boxes in batch.boxes]
        return Views(images, boxes, batch.ids.to(self.device, non_blocking=True), flips)

    def _room(self, view: int, crops: Tensor) -> Float[Tensor, "batch 3 size size"]:
        if self.kept is not None and view in self.kept and self.kept[view].shape == crops.shape:
            return self.kept[view]
        room = torch.empty(crops.shape, dtype=self.dtype, device=self.device, memory_format=self.layout)
        if self.kept is not None:
            self.kept[view] = room
        return room

    def _normalise(self, views: Float[Tensor, "batch 3 size size"], crops: UInt8[Tensor, "batch 3 size size"]) -> None:
        """What `normalise` gives, to rounding, in a seventh of the time: whole rows of pixels, one multiply-add."""
        mean, std = (torch.tensor(values).repeat(crops.shape[3]) for values in (self.config.mean, self.config.std))
        scale, shift = 1 / (255 * std), -mean / std
        direct = self.dtype == torch.float32 and self.layout == torch.channels_last
        for view, crop in zip(views, crops.permute(0, 2, 3, 1), strict=True):
            pixels = view.permute(1, 2, 0).copy_(crop) if direct else crop.float().contiguous()
            rows = pixels.flatten(1)
            torch.addcmul(shift, rows, scale, out=rows)
            if not direct:
                view.copy_(pixels.permute(2, 0, 1))

    def _finish(
        self,
        views: Float[Tensor, "batch 3 size size"],
        crops: UInt8[Tensor, "batch 3 size size"],
        parameters: Parameters,
    ) -> None:
        size = rows_within(CACHE, crops[0].numel()) if self.device.type == "cpu" else len(crops)
        for rows in chunks(len(crops), size):
            views[rows] = standardise(apply(to_float(crops[rows]), parameters[rows], self.config), self.config)


def normalise(
    images: UInt8[Tensor, "batch 3 height width"],
    config: AugmentConfig,
    device: torch.device | str,
    grey: bool = False,
) -> Float[Tensor, "batch 3 height width"]:
    """Images as a backbone expects them, without augmentation; `grey`: without their colours."""
    pixels = to_float(images.to(device, non_blocking=True))
    return standardise(luminance(pixels).repeat(1, 3, 1, 1) if grey else pixels, config)


def draw(config: AugmentConfig, seed: int, epoch: int, ids: NDArray[np.int64], view: int) -> Parameters:
    u = uniforms(derive(seed, "augment", epoch, view), ids, DRAWS)

    def between(column: int, low: float, high: float) -> Float[Tensor, "batch"]:
        return torch.from_numpy(low + (high - low) * u[:, column]).float()

    def factor(column: int, strength: float) -> Float[Tensor, "batch"]:
        return between(column, max(0.0, 1 - strength), 1 + strength)

    def chosen(column: int, probability: float) -> Bool[Tensor, "batch"]:
        return torch.from_numpy(u[:, column] < probability)

    return Parameters(
        jitter=chosen(0, config.jitter),
        order=torch.from_numpy(np.argsort(u[:, 1:5], axis=1)),
        brightness=factor(5, config.brightness),
        contrast=factor(6, config.contrast),
        saturation=factor(7, config.saturation),
        hue=between(8, -config.hue, config.hue),
        grey=chosen(9, config.grey),
        blur=chosen(10, config.blur),
        sigma=between(11, *config.blur_sigma),
        flip=chosen(12, config.flip),
        noise=between(13, 0.0, config.noise),
        noise_key=torch.from_numpy((u[:, 14] * 2.0**53).astype(np.int64)),
    )


def apply(
    images: Float[Tensor, "batch 3 height width"], parameters: Parameters, config: AugmentConfig
) -> Float[Tensor, "batch 3 height width"]:
    """Jitter, grey, blur, flip, noise. A sample that an operation does not concern keeps its values exactly."""
    # No matrix product and no convolution: those round to TF32 on a GPU, and in a way that depends on the batch.
    for concerned, operation in (
        (parameters.jitter, _jitter),
        (parameters.grey, _grey),
        (parameters.blur, partial(_blur, radius=blur_radius(config, *images.shape[2:]))),
        (parameters.flip, _flip),
        (parameters.noise > 0, _noise),
    ):
        rows = concerned.nonzero()[:, 0]
        if len(rows) == len(images):
            images = operation(images, parameters)
        elif len(rows) > 0:
            here = rows.to(images.device, non_blocking=True)
            images = images.index_copy(0, here, operation(images.index_select(0, here), parameters[rows]))
    return images


def _jitter(images: Tensor, parameters: Parameters) -> Tensor:
    """Each sample's four operations in its own order, one slot after the other. All but hue are 3 × 3 matrices."""
    matrices, towards_mean = colour_matrices(parameters)
    matrices = matrices.to(images.device, non_blocking=True)[..., None, None]  # batch slot out in 1 1
    to_mean = towards_mean.to(images.device, non_blocking=True)[..., None, None, None]
    for slot in range(len(OPERATIONS)):
        matrix = matrices[:, slot]
        mixed = images[:, 0:1] * matrix[:, :, 0]
        mixed.addcmul_(images[:, 1:2], matrix[:, :, 1]).addcmul_(images[:, 2:3], matrix[:, :, 2])
        if towards_mean[:, slot].any():
            mixed += to_mean[:, slot] * luminance(images.mean(dim=(2, 3), keepdim=True))
        images = mixed.clamp_(0, 1)
        rows = (parameters.order[:, slot] == OPERATIONS.index("hue")).nonzero()[:, 0]
        if len(rows) > 0:
            here = rows.to(images.device, non_blocking=True)
            images.index_copy_(0, here, turn_hue(images.index_select(0, here), parameters.hue[rows]))
    return images


def colour_matrices(parameters: Parameters) -> tuple[Float[Tensor, "batch 4 3 3"], Float[Tensor, "batch 4"]]:
    """For each slot a 3 × 3 matrix (hue: the identity), and the share of the image's mean grey to be added."""
    brightness, contrast, saturation = (
        factor[:, None, None] for factor in (parameters.brightness, parameters.contrast, parameters.saturation)
    )
    one = torch.eye(3)
    grey = torch.tensor(GREY).expand(3, 3)
    operations = (
        brightness * one,
        contrast * one,
        saturation * one + (1 - saturation) * grey,
        one.expand(len(brightness), 3, 3),
    )
    samples = torch.arange(len(brightness))[:, None]
    is_contrast = parameters.order == OPERATIONS.index("contrast")
    return torch.stack(operations, 1)[samples, parameters.order], torch.where(is_contrast, 1 - contrast[:, 0], 0.0)


def turn_hue(
    images: Float[Tensor, "batch 3 height width"], hue: Float[Tensor, "batch"]
) -> Float[Tensor, "batch 3 height width"]:
    """The hue of HSV turned by `hue` turns. A matrix (a rotation in YIQ) would be faster, but misses by as much as it
    changes (measured on sklearn's photographs: 0.028 against 0.022 at hue 0.1)."""
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp_min(1e-30)
    sextant = torch.where(
        high == red,
        (green - blue).div_(divisor),
        torch.where(high == green, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)),
    )
    sextant += 6 * hue.to(images.device, non_blocking=True)[:, None, None]
    turned = torch.empty_like(images)
    for channel, peak in enumerate((0, 2, 4)):  # where on the circle of six the channel is the brightest
        far = sextant - (peak + 3)  # from the sextant where it is the darkest
        far.sub_((far / 6).round_(), alpha=6).abs_().neg_().add_(2).clamp_(0, 1)
        turned[:, channel] = high - far.mul_(chroma)
    return turned


def _grey(images: Tensor, parameters: Parameters) -> Tensor:
    return luminance(images).expand_as(images)


def luminance(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    red, green, blue = images.split(1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def _blur(images: Tensor, parameters: Parameters, radius: int) -> Tensor:
    weights = blur_weights(parameters.sigma, radius)
    radius = int(weights.any(dim=0).sum()) - 1
    weights = weights.to(images.device, non_blocking=True)[:, :, None, None, None]
    images = smooth(pad(images, (radius, radius, 0, 0), mode="reflect"), weights, radius, dim=3)
    return smooth(pad(images, (0, 0, radius, radius), mode="reflect"), weights, radius, dim=2)


def blur_weights(sigma: Float[Tensor, "batch"], radius: int) -> Float[Tensor, "batch taps"]:
    """Of the middle and of each distance from it, in one direction."""
    distance = torch.arange(radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (distance / sigma.double()[:, None]) ** 2)
    kernel[kernel < FAINT] = 0  # exactly, so that it does not matter who else in the batch is blurred more
    return (kernel / (2 * kernel.sum(dim=1, keepdim=True) - 1)).float()


def blur_radius(config: AugmentConfig, height: int, width: int) -> int:
    """Three of the largest sigma, where the image is large enough to be reflected so far."""
    return min(math.ceil(3 * config.blur_sigma[1]), height - 1, width - 1)


def smooth(padded: Tensor, weights: Float[Tensor, "batch taps 1 1 1"], radius: int, dim: int) -> Tensor:
    """The weighted sum over neighbours in one direction."""
    length = padded.shape[dim] - 2 * radius
    out = padded.narrow(dim, radius, length) * weights[:, 0]
    for distance in range(1, radius + 1):
        pair = padded.narrow(dim, radius - distance, length) + padded.narrow(dim, radius + distance, length)
        out.addcmul_(pair, weights[:, distance])
    return out


def _flip(images: Tensor, parameters: Parameters) -> Tensor:
    return images.flip(3)


def _noise(images: Tensor, parameters: Parameters) -> Tensor:
    deviation = parameters.noise.to(images.device, non_blocking=True)[:, None, None, None]
    noise = hashed_bell(parameters.noise_key.to(images.device, non_blocking=True), images[0].numel())
    return (images + deviation * noise.view(images.shape)).clamp_(0, 1)


def hashed_bell(keys: Int64[Tensor, "batch"], count: int) -> Float[Tensor, "batch count"]:
    """`count` numbers for each key, near to normal: mean 0, deviation 1, at most 4.9."""
    return bell(keys[:, None] + hash_steps(count, keys.device))


def hash_steps(count: int, device: torch.device) -> Int64[Tensor, "count"]:
    return torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15)


def bell(x: Int64[Tensor, "batch count"]) -> Float[Tensor, "batch count"]:
    """The bytes of a hash (streams.uniforms' splitmix64), summed: integers, so a GPU gives the same bits as a CPU."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    even = 0x00FF00FF00FF00FF
    x = (x & even) + (_shift(x, 8) & even)  # four sums of two bytes each
    total = _shift(x * 0x0001000100010001, 48)
    return (total.float() - 8 * 127.5) * (1 / math.sqrt(8 * (256**2 - 1) / 12))


def _shift(x: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> repeats the sign


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def to_float(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def standardise(images: Float[Tensor, "batch 3 height width"], config: AugmentConfig) -> Tensor:
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        images[:, channel].sub_(mean).div_(std)  # numbers, not tensors: nothing to copy to a GPU
    return images
