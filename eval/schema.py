"""What the protocols of all tasks share: which data set is read, and how."""

from __future__ import annotations

from dataclasses import dataclass

from mls.config import ImagesConfig, share


@dataclass(frozen=True)
class DataSetConfig(ImagesConfig):
    name: str = "scenes"  # mls.eval.data.names()
    check_sizes: bool = True  # refuse another number of images than published
    max_unreadable: float = share(0.01)  # of one's own images, the share that may be broken; they are left out
