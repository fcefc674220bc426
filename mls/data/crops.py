"""In the worker: decode an image once, cut its crops and keep their boxes. Pixels stay uint8 and are not flipped or
coloured here (augment.py). A crop is a pure function of (seed, epoch, image id, view number)."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image

from mls.config import AugmentConfig
from mls.data import Batch, Source
from mls.errors import DataError
from mls.streams import derive, uniforms

# Named, because Pillow would also open formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
CROP_DRAWS = 2 + 2 * CROP_ATTEMPTS  # place, then area and ratio of each attempt
REPLACEMENTS = 20  # images tried in the place of one that cannot be read

Box = tuple[int, int, int, int]  # top, left, height, width


class UnreadableImage(Exception):
    """Bytes that give no image. The message is the reason; the caller knows where the bytes came from."""


class CropDataset(Dataset[Batch]):
    """Whole batches of crops. An index is (epoch, id); a batch sampler hands over all indices of one batch together.

    An image that cannot be read is replaced by another one, and noted in `Batch.unreadable`.
    """

    def __init__(self, source: Source, augment: AugmentConfig, seed: int) -> None:
        self.source, self.seed, self.ratio = source, seed, augment.ratio
        self.sizes = [augment.size] * 2 + [augment.small_size] * augment.small_crops
        self.scales = [augment.scale] * 2 + [augment.small_scale] * augment.small_crops

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        epoch = indices[0][0]
        if any(other != epoch for other, _ in indices):
            raise ValueError("the indices of one batch must share their epoch")
        ids = np.array([index for _, index in indices], dtype=np.int64)
        draws = self._draws(epoch, ids)
        crops = [torch.empty(len(ids), 3, size, size, dtype=torch.uint8) for size in self.sizes]
        boxes = np.empty((len(self.sizes), len(ids), 4), dtype=np.float32)
        unreadable: list[tuple[int, str]] = []
        for row, wanted in enumerate(ids.tolist()):
            index, image = self._read(epoch, wanted, unreadable)
            if index != wanted:
                ids[row] = index
                draws[:, row] = self._draws(epoch, ids[row : row + 1])[:, 0]
            height, width = image.shape[1:]
            for view, size in enumerate(self.sizes):
                box = crop_box(height, width, self.scales[view], self.ratio, draws[view, row].tolist())
                crops[view][row] = cut(image, box, size)
                boxes[view, row] = shares(box, height, width)
        return Batch(crops, [torch.from_numpy(view) for view in boxes], torch.from_numpy(ids), epoch, unreadable)

    def _draws(self, epoch: int, ids: NDArray[np.int64]) -> Float64[np.ndarray, "views batch draws"]:
        seeds = [derive(self.seed, "crop", epoch, view) for view in range(len(self.sizes))]
        return np.stack([uniforms(seed, ids, CROP_DRAWS) for seed in seeds])

    def _read(self, epoch: int, wanted: int, unreadable: list[tuple[int, str]]) -> tuple[int, Tensor]:
        """The wanted image or the first readable replacement, with its id."""
        for index in self._candidates(epoch, wanted):
            try:
                return index, decode(self.source.read(index))
            except (UnreadableImage, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)  # an OSError's text repeats the path
                note = (index, f"{self.source.describe(index)}: {reason}")
                if note not in unreadable:
                    unreadable.append(note)
        raise DataError(
            f"{self.source.describe(wanted)} and {REPLACEMENTS} images tried in its place cannot be read "
            f"(last: {unreadable[-1][1]}): check that data.root holds whole image files you may read"
        )

    def _candidates(self, epoch: int, wanted: int) -> Iterator[int]:
        yield wanted
        draws = uniforms(derive(self.seed, "replacement", epoch), np.array([wanted]), REPLACEMENTS)[0]
        yield from (draws * len(self.source)).astype(np.int64).tolist()


def decode(data: bytes | UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height width"]:
    """RGB pixels, upright by the EXIF orientation; the first frame of an animation; transparency is dropped.

    Raises UnreadableImage for anything that is no whole image, or so large that decoding it would eat the memory.
    """
    if isinstance(data, Tensor):
        return data
    if not data:
        raise UnreadableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and torchvision's about its move to torchcodec
            # Reads the header only: refuses what is too large before memory is spent, and says who can decode it.
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _decode(image, data)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # there is no end to what decoders raise at broken files
        text = str(error).strip().split("\n")[0]
        raise UnreadableImage(text or type(error).__name__) from error


def _decode(image: Image.Image, data: bytes) -> UInt8[Tensor, "3 height width"]:
    if image.format in ("JPEG", "MPO", "PNG") and image.mode in ("L", "LA", "RGB", "RGBA"):
        try:  # half of Pillow's time for a JPEG
            pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB, True)
        except RuntimeError:
            pass  # Pillow reads some files with small faults; what is really broken it refuses too
        else:
            if pixels.dtype == torch.uint8:  # 16-bit colour comes as uint16
                return pixels
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        grey = np.asarray(image).clip(0, 65535) >> 8
        return torch.from_numpy(grey.astype(np.uint8)).repeat(3, 1, 1)
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"32-bit pixels (mode {image.mode}) have no known range")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Sequence[float]
) -> Box:
    """The distribution of torchvision's RandomResizedCrop, as a pure function of CROP_DRAWS numbers in [0, 1).

    >>> crop_box(100, 200, (1.0, 1.0), (2.0, 2.0), [0.5] * CROP_DRAWS)
    (0, 0, 100, 200)
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(2, CROP_DRAWS, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        aspect = math.exp(low + (high - low) * draws[attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def shares(box: Box, height: int, width: int) -> tuple[float, float, float, float]:
    """The box as x0 y0 x1 y1 in shares of the image's width and height."""
    top, left, h, w = box
    return left / width, top / height, (left + w) / width, (top + h) / height


def cut(image: UInt8[Tensor, "3 height width"], box: Box, size: int) -> UInt8[Tensor, "3 size size"]:
    """The box of the image, scaled to size × size (bilinear, antialiased)."""
    top, left, h, w = box
    crop = image[:, top : top + h, left : left + w]
    if (h, w) == (size, size):
        return crop
    return interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)[0]


def centre(image: UInt8[Tensor, "3 height width"], size: int) -> UInt8[Tensor, "3 size size"]:
    """The largest square in the middle, scaled to size × size: what evaluation sees."""
    height, width = image.shape[1:]
    side = min(height, width)
    return cut(image, ((height - side) // 2, (width - side) // 2, side, side), size)
