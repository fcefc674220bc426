"""Which image files are read: always, where their library is installed, and not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from PIL import features

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
# An explicit list: Pillow would also open formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
if find_spec("pillow_heif") is not None:
    from pillow_heif import register_heif_opener  # pyright: ignore

    register_heif_opener()
    EXTENSIONS, FORMATS = (*EXTENSIONS, "heic", "heif"), (*FORMATS, "HEIF")
if features.check("avif"):
    EXTENSIONS, FORMATS = (*EXTENSIONS, "avif"), (*FORMATS, "AVIF")
ADVICE = dict.fromkeys(("heic", "heif"), 'pip install "mls[heif]"') | {"avif": "pip install -U pillow"}
# Pictures that nothing here reads. Other files beside the images are no pictures that are missed.
UNREAD = ("jxl", "jp2", "psd", "svg", "raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2")
MISSED = frozenset((*ADVICE, *UNREAD)) - frozenset(EXTENSIONS)


def missed(names: Sequence[bytes]) -> str:
    """What is said of pictures that are ignored.

    >>> missed([b"a.psd", b"b/c.PSD"])
    'ignored: 2 .psd (convert them to JPEG or PNG)'
    """
    kinds = Counter(name.rpartition(b".")[2].lower().decode() for name in names)
    words = (f"{n} .{kind} ({ADVICE.get(kind, 'convert them to JPEG or PNG')})" for kind, n in sorted(kinds.items()))
    return f"ignored: {', '.join(words)}" if kinds else ""
