"""What the protocols of all tasks share: which data set is read, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from mls.config import ScenesConfig


@dataclass(frozen=True)
class DataSetConfig:
    name: str = "scenes"  # mls.eval.data.names()
    root: str | None = None  # default: the data set's folder under $MLS_DATA
    check_sizes: bool = True  # refuse another number of images than published
    workers: int | None = None  # default: the cores this process may use, at most 8
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
