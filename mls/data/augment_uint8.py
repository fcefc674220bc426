"""In the worker, for a training on CPUs: what augment.py does to a batch on the device, done to one uint8 crop after
the other with OpenCV, by the same parameters. Each operation rounds to 1/255, as it does in MoCo's own pipeline."""

from __future__ import annotations

import math
from dataclasses import fields
from types import SimpleNamespace

import cv2
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from mls.config import AugmentConfig
from mls.data.augment import GREY, Parameters, blur_radius

INVISIBLE = 1 / 512  # blur weights below this share of the middle one move no pixel by a whole step

Pixels = UInt8[np.ndarray, "height width 3"]


def augment_in_place(
    crops: UInt8[Tensor, "batch 3 height width"], parameters: Parameters, config: AugmentConfig
) -> None:
    """Jitter, grey, blur and flip; noise is left to the device. The crops must be channels-last."""
    cv2.setNumThreads(1)  # the cores are the other workers'
    names = [field.name for field in fields(parameters)]
    samples = zip(*(getattr(parameters, name).tolist() for name in names), strict=True)
    radius = blur_radius(config, *crops.shape[2:])
    for image, values in zip(crops.permute(0, 2, 3, 1).numpy(), samples, strict=True):
        sample = SimpleNamespace(**dict(zip(names, values, strict=True)))
        if sample.jitter:
            for operation in sample.order:
                JITTER[operation](image, sample)
        if sample.grey:
            cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, dst=image)
        if sample.blur:
            _blur(image, sample.sigma, radius)
        if sample.flip:
            cv2.flip(image, 1, dst=image)


def _brightness(image: Pixels, sample: SimpleNamespace) -> None:
    cv2.convertScaleAbs(image, alpha=sample.brightness, dst=image)


def _contrast(image: Pixels, sample: SimpleNamespace) -> None:
    mean = float(np.dot(cv2.mean(image)[:3], GREY))
    cv2.addWeighted(image, sample.contrast, image, 0, (1 - sample.contrast) * mean, dst=image)


def _saturation(image: Pixels, sample: SimpleNamespace) -> None:
    matrix = sample.saturation * np.eye(3) + (1 - sample.saturation) * np.array([GREY])
    cv2.transform(image, matrix, dst=image)


def _hue(image: Pixels, sample: SimpleNamespace) -> None:
    """In float: a uint8 hue has 256 steps."""
    pixels = image.astype(np.float32)
    cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV, dst=pixels)  # degrees, [0, 1], [0, 255]
    cv2.add(pixels, (360 * (sample.hue % 1), 0, 0, 0), dst=pixels)
    cv2.cvtColor(pixels, cv2.COLOR_HSV2RGB, dst=pixels)
    cv2.convertScaleAbs(pixels, dst=image)


JITTER = (_brightness, _contrast, _saturation, _hue)  # by the numbers in Parameters.order


def _blur(image: Pixels, sigma: float, radius: int) -> None:
    radius = min(radius, math.floor(sigma * math.sqrt(-2 * math.log(INVISIBLE))))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    cv2.sepFilter2D(image, -1, kernel, kernel, dst=image, borderType=cv2.BORDER_REFLECT_101)
