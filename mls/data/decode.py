"""From the bytes of an image file to its pixels: the header first, then as many pixels as are needed. torchvision
decodes what it can, Pillow the rest. Crops are cut in crops.py."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from mls.data.formats import FORMATS

FACTORS = (8, 4, 2)  # of fast scaled JPEG decoding: its blocks are 8 × 8 pixels
WIDTH, HEIGHT = 256, 257  # tags of TIFF
ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 5 to 8 lie on their side
MPO = "MPO"  # Pillow's name of a JPEG with further pictures after the first


class UnreadableImage(Exception):
    """The bytes cannot be decoded. The message is the reason; the caller adds the file's name."""


class Encoded:
    """An image of which only the header was read: its size (upright) is known before any pixel.

    Raises UnreadableImage for bytes that are no image, or so large an image that decoding it would exhaust the memory.
    `pixels` raises it for truncated images.
    """

    def __init__(self, data: bytes | UInt8[Tensor, "3 height width"]) -> None:
        self.data = data
        if isinstance(data, Tensor):
            self.height, self.width = data.shape[1:]
            return
        if not data:
            raise UnreadableImage("the file is empty")
        with _reasons():
            self.header = Image.open(io.BytesIO(data), formats=FORMATS)
            self.orientation = Image.Image.getexif(self.header).get(ORIENTATION, 1)  # a PNG's own decodes all pixels
            size = self.header.size
            if isinstance(self.header, TiffImageFile):  # whose size may be the upright one already
                size = self.header.tag_v2[WIDTH], self.header.tag_v2[HEIGHT]
        self.width, self.height = size[:: -1 if self.orientation in (5, 6, 7, 8) else 1]

    def factor(self, most: float) -> int:
        """The largest of 8, 4, 2 and 1 that is at most `most` and that `pixels` can decode at."""
        if isinstance(self.data, Tensor) or self.header.format not in ("JPEG", MPO):
            return 1
        if self.header.mode not in ("L", "RGB"):
            return 1
        for factor in FACTORS:
            # If a side does not divide, the last scaled pixel is cut off; a rotated image may begin with it.
            whole = self.orientation == 1 or not (self.height % factor or self.width % factor)
            if factor <= most and whole:
                return factor
        return 1

    def pixels(self, factor: int = 1) -> UInt8[Tensor, "3 _ _"]:
        """RGB, upright by the EXIF orientation; the first frame of an animation; transparency is dropped.

        With a factor each pixel is the mean of factor × factor pixels, computed by the JPEG decoder; a remainder at the
        edge becomes a pixel, too.
        """
        if isinstance(self.data, Tensor):
            return self.data
        with _reasons():
            if factor > 1:
                self.header.draft(self.header.mode, (self.header.width // factor, self.header.height // factor))
            elif (pixels := self._by_torchvision(self.data)) is not None:
                return pixels
            return _by_pillow(self.header)

    def _by_torchvision(self, data: bytes) -> UInt8[Tensor, "3 height width"] | None:
        """Takes three quarters of Pillow's time; None for files that only Pillow can read."""
        if self.header.format not in ("JPEG", MPO, "PNG") or self.header.mode not in ("L", "LA", "RGB", "RGBA"):
            return None
        if self.orientation != 1 and "exif" not in self.header.info:
            return None  # it stands in XMP, which torchvision does not read
        try:
            pixels = decode_image(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB, True)
        except RuntimeError:
            return None  # Pillow reads some files with small faults, and refuses those that are broken
        # 16-bit colour is decoded to uint16; from a damaged EXIF block the two may read different orientations.
        usable = pixels.dtype == torch.uint8 and pixels.shape[1:] == (self.height, self.width)
        return pixels if usable else None


def decode(data: bytes | UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height width"]:
    """All pixels of an image file, as `Encoded.pixels` gives them."""
    return Encoded(data).pixels()


def _by_pillow(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    kind = image.format  # of what is turned there is none
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind != "TIFF"):
        grey = np.asarray(image).clip(0, 65535) >> 8
        return torch.from_numpy(grey.astype(np.uint8)).repeat(3, 1, 1)
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"32-bit pixels (mode {image.mode}) have no known range")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn all exceptions of a decoder into UnreadableImage, and suppress its warnings about metadata."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # also torch's, that the buffer is not writable
            yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise many kinds of exceptions for broken files
        text = str(error).strip().split("\n")[0]
        raise UnreadableImage(text or type(error).__name__) from error
