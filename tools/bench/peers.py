"""The pipelines of others that `mls bench input` times beside ours, where they are installed: one image's bytes to two
views with MoCo-v2's operations and probabilities (`views`), or to two crops alone (`crops`)."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MOCO, LIGHTLY, V2, ALBUMENTATIONS, DALI = "MoCo's pipeline", "lightly", "torchvision v2", "albumentations", "DALI"

Pipeline = Callable[[bytes], Any]


def views() -> dict[str, Pipeline]:
    """From bytes to two normalised views."""
    found = {MOCO: moco(), V2: torchvision_v2(normalised=True)}
    return found | _installed({LIGHTLY: lightly, ALBUMENTATIONS: lambda: albumentations(normalised=True)})


def crops() -> dict[str, Pipeline]:
    """From bytes to two uint8 crops."""
    found = {V2: torchvision_v2(normalised=False)}
    return found | _installed({ALBUMENTATIONS: lambda: albumentations(normalised=False)})


def _installed(makers: dict[str, Callable[[], Pipeline]]) -> dict[str, Pipeline]:
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError:
            continue
    return found


def _twice(decode: Callable[[bytes], Any], transform: Callable[[Any], Any]) -> Pipeline:
    def two(data: bytes) -> list[Any]:
        image = decode(data)
        return [transform(image), transform(image)]

    return two


def _by_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def moco() -> Pipeline:
    """As MoCo-v2's published code makes them: Pillow, and the whole augmentation in the worker."""
    steps = [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([_blur], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean=MEAN, std=STD),
    ]
    return _twice(_by_pillow, transforms.Compose(steps))


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def lightly() -> Pipeline:
    from lightly.transforms import MoCoV2Transform  # pyright: ignore

    transform = MoCoV2Transform()
    return lambda data: transform(_by_pillow(data))


def torchvision_v2(normalised: bool) -> Pipeline:
    crop, decode = v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True), _by_torchvision
    steps = [
        crop,
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=MEAN, std=STD),
    ]
    return _twice(decode, v2.Compose(steps) if normalised else crop)


def _by_torchvision(data: bytes) -> torch.Tensor:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def albumentations(normalised: bool) -> Pipeline:
    import albumentations as A  # pyright: ignore
    import cv2
    from albumentations.pytorch import ToTensorV2  # pyright: ignore

    cv2.setNumThreads(1)
    crop, size = A.RandomResizedCrop((224, 224), scale=(0.2, 1.0)), (0.6, 1.4)
    steps = [
        crop,
        A.ColorJitter(brightness=size, contrast=size, saturation=size, hue=(-0.1, 0.1), p=0.8),
        A.ToGray(p=0.2),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
        A.HorizontalFlip(p=0.5),
        A.Normalize(mean=MEAN, std=STD),
        ToTensorV2(),
    ]
    transform = A.Compose(steps if normalised else [crop])
    return _twice(lambda data: _by_opencv(cv2, data), lambda image: transform(image=image)["image"])


def _by_opencv(cv2: Any, data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def dali(files: list[bytes], normalised: bool) -> Callable[[], None] | None:
    """All files once, a batch of 32 at a time in one thread; its jitter has a fixed order and its blur spares nobody,
    since it draws numbers and not choices. None where it is not installed."""
    try:
        from nvidia.dali import fn, pipeline_def, types  # pyright: ignore
    except ImportError:
        return None
    folder = tempfile.mkdtemp()
    for number, data in enumerate(files):
        Path(folder, f"{number:05d}.jpg").write_bytes(data)

    @pipeline_def(batch_size=32, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def two_views() -> Any:
        data, _ = fn.readers.file(files=sorted(str(file) for file in Path(folder).iterdir()))
        image = fn.decoders.image(data, device="cpu")
        made = [fn.random_resized_crop(image, size=(224, 224), random_area=(0.2, 1.0)) for _ in range(2)]
        return tuple(_finished(fn, types, one) for one in made) if normalised else tuple(made)

    pipeline: Any = two_views()
    pipeline.build()

    def all_of_them() -> None:
        for _ in range(-(-len(files) // 32)):
            pipeline.run()

    return all_of_them


def _finished(fn: Any, types: Any, image: Any) -> Any:
    around = lambda low, high: fn.random.uniform(range=(low, high))
    image = fn.color_twist(
        image, brightness=around(0.6, 1.4), contrast=around(0.6, 1.4), saturation=around(0.6, 1.4), hue=around(-36, 36)
    )
    image = fn.gaussian_blur(image, sigma=around(0.1, 2.0))
    mean, std = [255 * value for value in MEAN], [255 * value for value in STD]
    mirror = fn.random.coin_flip()
    return fn.crop_mirror_normalize(image, dtype=types.FLOAT, mean=mean, std=std, mirror=mirror)
