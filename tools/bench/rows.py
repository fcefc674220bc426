"""What `mls bench input` times: ours and its parts, the pipelines of others (peers.py), other decoders, the device's
share. What is made of the times is in input.py."""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import models

from mls.chunks import chunks
from mls.config import AugmentConfig
from mls.data import Batch, Source
from mls.data.augment import Augment
from mls.data.crops import CROP_DRAWS, CropDataset, crop_box, cut_into
from mls.data.decode import Encoded
from mls.streams import uniforms
from mls.tools.bench import peers
from mls.tools.bench.timing import median_seconds

VIEWS, CROPS = "two normalised views", "two uint8 crops"  # what a row ends with
OURS, DEVICE, PACKED = "ours", "ours, engine.augment=device", "ours, packed with --short-side 320"
DECODE = "decoding alone"
READ, CUT = "reading and headers", "cutting two crops"
PILLOW, HALF, SIMPLE = "Pillow", "Pillow, at 1/2 (draft)", "simplejpeg"
SCALED, WHOLE = "ours", "ours, decoding all pixels"
LARGE = {SCALED: "large, scaled", WHOLE: "large, whole"}  # the rows of the large photographs
BATCH = 32
DECODED = 16  # images held as pixels to cut from

Row = tuple[Callable[[], None], int]  # prepares all images once; how many they are
Name = str | tuple[str, str]  # of a row: a pipeline and what it ends with, or a part


class Race(Dataset[dict[Name, float]]):
    """An item is one round: the seconds an image that each row takes, in the worker process that reads the item."""

    def __init__(self, files: Source, packed: Source, large: Source, rounds: int) -> None:
        self.files, self.packed, self.large, self.rounds = files, packed, large, rounds
        self.rows: dict[Name, Row] = {}

    def __len__(self) -> int:
        return self.rounds

    def __getitem__(self, item: int) -> dict[Name, float]:
        self.rows = self.rows or self._rows()
        order = list(self.rows.items())
        random.Random(item).shuffle(order)
        return {name: _seconds(work) / count for name, (work, count) in order}

    def _rows(self) -> dict[Name, Row]:
        count = len(self.files)

        def read(i: int) -> bytes:
            data = self.files.read(i)
            assert isinstance(data, bytes)
            return data

        def each(work: Callable[[int], Any]) -> Row:
            def all_of_them() -> None:
                for i in range(count):
                    work(i)

            return all_of_them, count

        def of_bytes(pipeline: peers.Pipeline) -> Row:
            return each(lambda i: pipeline(read(i)))

        rows: dict[Name, Row] = {(name, VIEWS): of_bytes(made) for name, made in peers.views().items()}
        rows |= {(name, CROPS): of_bytes(made) for name, made in peers.crops().items()}
        for end in (VIEWS, CROPS):
            if all_of_them := peers.dali([read(i) for i in range(count)], end == VIEWS):
                rows[peers.DALI, end] = all_of_them, count
            rows[OURS, end] = _batches(self.files, views=end == VIEWS)
            rows[PACKED, end] = _batches(self.packed, views=end == VIEWS)
        rows |= {
            (DEVICE, VIEWS): _batches(self.files, views=True, finish=False),
            DECODE: each(lambda i: Encoded(read(i)).pixels()),
            READ: each(lambda i: Encoded(read(i))),
            CUT: each(_cutter([Encoded(read(i)).pixels() for i in range(min(DECODED, count))])),
            PILLOW: each(lambda i: np.asarray(Image.open(io.BytesIO(read(i))).convert("RGB"))),
            HALF: each(lambda i: _at_half(read(i))),
            LARGE[SCALED]: _batches(self.large, views=False),
            LARGE[WHOLE]: _batches(self.large, views=False, spare=math.inf),
        }
        try:
            import simplejpeg  # pyright: ignore
        except ImportError:
            return rows
        if all(read(i).startswith(b"\xff\xd8") for i in range(count)):
            rows[SIMPLE] = each(lambda i: simplejpeg.decode_jpeg(read(i)))
        return rows


def _seconds(work: Callable[[], None]) -> float:
    """Processor time of this process, in which one thread works (DALI brings its own)."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _batches(source: Source, views: bool, finish: bool = True, spare: float | None = None) -> Row:
    """The dataset as a training's worker has it, shared memory included; for views with what the training process does
    to a batch."""
    dataset = CropDataset(source, AugmentConfig(), seed=0, buffers=2, finish=finish and views)
    augment = Augment(AugmentConfig(), 0, "cpu", reuse=True)
    dataset.spare = dataset.spare if spare is None else spare
    parts = [[(1, i) for i in range(part.start, part.stop)] for part in chunks(len(source), BATCH)]

    def all_of_them() -> None:
        for part in parts:
            made = dataset.__getitems__(part)
            if views:
                augment(made)

    return all_of_them, len(source)


def _cutter(images: list[Tensor]) -> Callable[[int], None]:
    config, out = AugmentConfig(), torch.empty(1, 3, 224, 224, dtype=torch.uint8)
    draws = uniforms(0, np.arange(1000), CROP_DRAWS)

    def two(i: int) -> None:
        image = images[i % len(images)]
        for draw in draws[[2 * i % 1000, (2 * i + 1) % 1000]].tolist():
            cut_into(out, image, crop_box(image.shape[1], image.shape[2], config.scale, config.ratio, draw))

    return two


def _at_half(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // 2, image.height // 2))
    return np.asarray(image.convert("RGB"))


def device_seconds(device: str, batch: int) -> tuple[float, float]:
    """Of the augmentation of a batch (two views), and of a ResNet-50 that runs forward and backward on one view and
    forward on the other, as MoCo does. Medians, in turns."""
    half = torch.bfloat16 if device == "cuda" else torch.float32
    augment = Augment(AugmentConfig(), 0, device, dtype=half)
    crops = [torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8) for _ in range(2)]
    made = Batch(crops, [torch.zeros(batch, 4)] * 2, torch.arange(batch), epoch=1)
    model = models.resnet50(num_classes=256).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step() -> None:
        query, key = views
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(query).square().mean()
            with torch.no_grad():
                model(key)
        loss.backward()

    views = augment(made).images
    found = median_seconds({"augment": lambda: augment(made), "step": step}, device, rounds=3)
    return found["augment"], found["step"]
