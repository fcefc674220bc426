"""`data.source=parquet`: images as bytes in .parquet files, read a row group at a time, in bounded memory."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mls.config import DataConfig
from mls.data.listing import locate, multi_hot, multi_hot_of, root_text, show
from mls.errors import ConfigError, DataError, reason
from mls.streams import generator

HELD = 128 << 20  # bytes of images that a process keeps: the row groups it read last, one at least
OPEN_FILES = 16
LABELS = ("label", "labels", "class")  # names of a column of class numbers
MOST_CLASSES = 100_000  # without names: a larger number is not that of a class


def from_parquet(config: DataConfig) -> ParquetSource:
    if find_spec("pyarrow") is None:
        raise ConfigError('data.source=parquet needs pyarrow: pip install "mls[parquet]"')
    root = locate(root_text(config))
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not files:
        raise DataError(f"no .parquet files under {show(root)}: point data.root to the folder that has them")
    return ParquetSource(files, config.limit)


class ParquetSource:
    """Numbered file by file, row by row. The image column holds bytes, or a struct with `bytes` as Hugging Face writes
    it; a column `label` of whole numbers gives classes."""

    def __init__(self, files: Sequence[Path], limit: int | None = None) -> None:
        self._files = [os.fsencode(file) for file in files]
        self._start_afresh()
        schemas = [self._opened(number).schema_arrow for number in range(len(files))]
        self.column, label = _image_column(schemas[0], files[0]), _label_column(schemas[0])
        for file, schema in zip(files, schemas, strict=True):
            if self.column not in schema.names:
                raise DataError(f"{show(file)} has no column {self.column} as {show(files[0])} has: take it away")
        counts = [self._metadata(number).num_row_groups for number in range(len(files))]
        groups = [(number, group) for number, count in enumerate(counts) for group in range(count)]
        rows = [self._metadata(number).row_group(group).num_rows for number, group in groups]
        self._groups, starts = np.array(groups, np.int64).reshape(-1, 2), np.cumsum([0, *rows])
        if not starts[-1]:
            raise DataError(f"{show(files[0])} has no rows: name files with images")
        self._starts = starts.clip(max=min(int(starts[-1]), limit or int(starts[-1])))
        more = f"+{len(files) - 1}" if len(files) > 1 else ""
        self.name = f"parquet:{show(files[0].name)}{more}"
        self.class_names, self._pairs = None, None
        if label is not None and all(label in schema.names for schema in schemas):
            self.class_names, self._pairs = self._labels(label, schemas[0])

    def _start_afresh(self) -> None:
        self._opened = lru_cache(OPEN_FILES)(self._open)
        self._held: OrderedDict[int, Any] = OrderedDict()  # row groups, the one that was read last at the end

    def _open(self, number: int) -> Any:
        import pyarrow.parquet as pq  # pyright: ignore

        file = os.fsdecode(self._files[number])
        try:
            return pq.ParquetFile(file, pre_buffer=False)
        except Exception as error:  # pyarrow has its own kinds
            raise DataError(f"{show(file)} is no whole .parquet file ({reason(error)}): write it again") from None

    def _metadata(self, number: int) -> Any:
        return self._opened(number).metadata

    def _labels(self, label: str, schema: Any) -> tuple[list[str] | None, NDArray[np.int64] | None]:
        columns = [
            self._opened(number).read([label], use_threads=False).column(0) for number in range(len(self._files))
        ]
        if any(column.null_count for column in columns):
            return None, None
        numbers = np.concatenate([column.to_numpy() for column in columns]).astype(np.int64)[: len(self)]
        names, most = _class_names(schema, label), int(numbers.max())
        if names is None and most >= MOST_CLASSES:
            file = show(os.fsdecode(self._files[0]))
            raise DataError(f"{file} has {most} in its column {label}, which is no class number: rename that column")
        names = names or [str(number) for number in range(most + 1)]
        if numbers.min() < 0 or most >= len(names):
            return None, None  # -1 says that nobody knows
        return names, np.stack([np.arange(len(numbers)), numbers], axis=1)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def labels(self) -> Float[Tensor, "images classes"] | None:
        if self.class_names is None or self._pairs is None:
            return None
        return multi_hot(self._pairs, len(self), len(self.class_names))

    def labels_of(self, ids: Int64[Tensor, " some"]) -> Float[Tensor, "some classes"]:
        assert self.class_names is not None and self._pairs is not None
        return multi_hot_of(ids, self._pairs, len(self), len(self.class_names))

    def read(self, index: int) -> bytes:
        group = self._group_of(index)
        value = self._rows(group)[index - int(self._starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise OSError("the row has no bytes")
        return data

    def describe(self, index: int) -> str:
        group = self._group_of(index)
        file = int(self._groups[group, 0])
        first = int(np.searchsorted(self._groups[:, 0], file))
        return f"{show(os.fsdecode(self._files[file]))}:{index - int(self._starts[first])}"

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Row groups are shuffled, then the images of as many as a process keeps, so that each is read once an epoch by
        each worker. The whole epoch's order: a batch depends on no number of workers or processes."""
        draw = generator(seed, "order", epoch)
        windows, held = [list[NDArray[np.int64]]()], 0
        for group in torch.randperm(len(self._groups), generator=draw).tolist():
            if windows[-1] and held + self._bytes_of(group) > HELD:
                windows, held = [*windows, []], 0
            windows[-1].append(np.arange(int(self._starts[group]), int(self._starts[group + 1])))
            held += self._bytes_of(group)
        joined = [np.concatenate(window) for window in windows]
        return np.concatenate([ids[torch.randperm(len(ids), generator=draw).numpy()] for ids in joined])

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    @property
    def identity(self) -> str:
        """The sizes of the image column in each row group: other images have others."""
        groups = range(self._group_of(len(self) - 1) + 1)  # those behind data.limit do not count
        chunks = [one for group in groups for one in self._chunks(group)]
        return repr([(one.total_uncompressed_size, one.total_compressed_size) for one in chunks])

    def _bytes_of(self, group: int) -> int:
        return sum(one.total_uncompressed_size for one in self._chunks(group))

    def _chunks(self, group: int) -> list[Any]:
        """What the footer says of the image column, or of each part of its structs, in a row group."""
        file, number = self._groups[group].tolist()
        found = self._metadata(file).row_group(number)
        columns = (found.column(place) for place in range(found.num_columns))
        return [one for one in columns if one.path_in_schema.split(".")[0] == self.column]

    def _rows(self, group: int) -> Any:
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        file, number = self._groups[group].tolist()
        try:
            rows = self._opened(file).read_row_group(number, columns=[self.column], use_threads=False).column(0)
        except Exception as error:  # of pyarrow: what is damaged is told as of any image
            raise OSError(f"its row group cannot be read ({reason(error)})") from None
        self._held[group] = rows
        while len(self._held) > 1 and sum(one.nbytes for one in self._held.values()) > HELD:
            self._held.popitem(last=False)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_opened", "_held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_afresh()


def _image_column(schema: Any, file: Path) -> str:
    """The first column of bytes, or of structs with bytes."""
    import pyarrow as pa  # pyright: ignore

    def is_bytes(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    for field in schema:
        struct = pa.types.is_struct(field.type)
        inside = [field.type.field(place) for place in range(field.type.num_fields)] if struct else []
        if is_bytes(field.type) or any(one.name == "bytes" and is_bytes(one.type) for one in inside):
            return field.name
    raise DataError(
        f"{show(file)} has no column of image bytes (columns: {', '.join(schema.names)}): write encoded images into one"
    )


def _label_column(schema: Any) -> str | None:
    import pyarrow as pa  # pyright: ignore

    whole = {field.name for field in schema if pa.types.is_integer(field.type)}
    return next((name for name in LABELS if name in whole), None)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """As Hugging Face's library keeps them in the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
