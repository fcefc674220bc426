"""The dictionary: a ring of past keys with the image and the crop that each came from. It only remembers; what a step
asks its rows is in queried_rows.py, which process holds which rows in sharding.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mls.chunks import chunks
from mls.core.sharding import WHOLE, Sharding
from mls.distributed import gather
from mls.errors import CheckpointError, ConfigError

EMPTY = -1  # the id of a slot that was never written
STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVED_AT_ONCE = 4096  # rows of each process that are together on one device while a sharded dictionary is saved


class Rows:
    """Row i of every field belongs to the same key. Beside the fields below there is one for each memory of the
    dictionary, `rows.backbone` and `rows.projection` for example. All are views: the next enqueue writes into them."""

    ids: Int64[Tensor, "rows"]  # the images' numbers
    boxes: Float[Tensor, "rows 4"]  # the crops' places in their images; NaN where none was given
    ages: Int64[Tensor, "rows"]  # the enqueue that wrote the row, from 1; `count - ages` is how many came since

    def __init__(self, **memories: Tensor) -> None:  # no SimpleNamespace: torch.compile cannot follow it
        for name, tensor in memories.items():
            setattr(self, name, tensor)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...


class Dictionary:
    """Memories of any names and widths in one ring with one write head, so that their rows can never come out of step.
    A width may be a tuple, for a set of features a row.

    Not an nn.Module, and its tensors are no buffers: DDP broadcasts every buffer from rank 0 at every forward, and for
    65536 x 2048 rows that alone took 230 ms a step (4 ms without). Every process enqueues the same gathered keys
    instead, so all hold the same rows and any one of them can save for all. With a `sharding` over several processes
    each holds its part of the memories. `storage` is how they are kept; products are taken in fp32.

    >>> from torch.nn.functional import normalize
    >>> dictionary = Dictionary(4, backbone=8, projection=2)
    >>> for step in range(3):
    ...     keys = normalize(torch.randn(2, 8)), normalize(torch.randn(2, 2))
    ...     dictionary.enqueue(*keys, ids=torch.tensor([2 * step, 2 * step + 1]))
    >>> dictionary.rows().ids.tolist(), (dictionary.count - dictionary.rows().ages).tolist()
    ([4, 5, 2, 3], [0, 0, 1, 1])
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str | None = None,
        storage: str = "fp32",
        sharding: Sharding = WHOLE,
        **widths: int | tuple[int, ...],
    ) -> None:
        if size < 1:
            raise ConfigError(f"dictionary.size {size} holds no rows: set dictionary.size to 1 or more")
        if size % sharding.world:
            raise ConfigError(
                f"dictionary.size {size} does not divide among {sharding.world} processes: "
                f"use {(size // sharding.world + 1) * sharding.world}, or dictionary.sharded=false"
            )
        self.capacity = size
        self.sharding = sharding
        self.count = 0  # enqueues so far
        self._filled = 0
        self._head = 0
        self.names = tuple(widths)  # of the memories: these are sharded; ids, boxes and ages are small and whole
        self._tensors = {
            name: torch.zeros(size // sharding.world, *_shape(width), device=device, dtype=STORAGE[storage])
            for name, width in widths.items()
        }
        self._tensors |= {
            "ids": torch.full((size,), EMPTY, dtype=torch.int64, device=device),
            "boxes": torch.full((size, 4), torch.nan, device=device),
            "ages": torch.zeros(size, dtype=torch.int64, device=device),
        }

    def __len__(self) -> int:
        return self._filled

    @property
    def filled(self) -> int:
        """How many rows hold a key; at most `capacity`."""
        return self._filled

    @property
    def nbytes(self) -> int:
        """Of all slots that this process holds."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def ids(self) -> Int64[Tensor, "slots"]:
        """The images of all filled slots, of all processes."""
        return self._tensors["ids"][: self._filled]

    @property
    def boxes(self) -> Float[Tensor, "slots 4"]:
        """The crops of all filled slots, of all processes."""
        return self._tensors["boxes"][: self._filled]

    @property
    def enqueues_since(self) -> Int64[Tensor, "slots"]:
        """How many enqueues came since that of each filled slot, of all processes."""
        return self.count - self._tensors["ages"][: self._filled]

    def rows(self) -> Rows:
        """The filled part that this process holds, in slot order (not in order of age)."""
        held = self.sharding.held(self._filled)
        return Rows(
            **{
                name: tensor[:held] if name in self.names else self.sharding.of(tensor)[:held]
                for name, tensor in self._tensors.items()
            }
        )

    @torch.no_grad()
    def enqueue(self, *keys: Tensor, **named: Tensor) -> None:
        """Writes a batch of any size over the oldest rows; of a batch larger than the ring the last rows stay. Takes
        the memories in their order, then `ids` and, if they are known, `boxes`; or any of them by name.

        Rows are stored as they come: normalise them before. Autograd notices a write between a forward that used
        `rows()` and its backward, and refuses.
        """
        new = self._checked((*self.names, "ids", "boxes"), keys, named)
        new["ages"] = torch.full_like(new["ids"], self.count + 1)
        batch = len(new["ids"])
        written = min(batch, self.capacity)
        for name, tensor in self._tensors.items():
            source, head = new[name][batch - written :], self._head
            if name in self.names:
                source, head = self.sharding.share_of(source, head)
            before_end = min(len(source), len(tensor) - head)
            tensor[head : head + before_end].copy_(source[:before_end])
            tensor[: len(source) - before_end].copy_(source[before_end:])
        self._head = (self._head + written) % self.capacity
        self._filled = min(self._filled + written, self.capacity)
        self.count += 1

    def _checked(self, names: Sequence[str], keys: tuple[Tensor, ...], named: dict[str, Tensor]) -> dict[str, Tensor]:
        """What was given by name, each of the shape that its memory takes: copy_ would broadcast another in silence."""
        new = dict(zip(names, keys, strict=False)) | named
        once = len(new) == len(keys) + len(named)
        if not (once and {*names[:-1]} <= new.keys() <= {*names}):
            raise TypeError(f"enqueue takes {', '.join(names[:-1])} and, if known, boxes: got {', '.join(new)}")
        if "boxes" not in new:
            new["boxes"] = self._tensors["boxes"].new_full((len(new["ids"]), 4), torch.nan)
        for name, tensor in new.items():
            wanted = (len(new["ids"]), *self._tensors[name].shape[1:])
            if tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"enqueue got {name} of shape {_written(tensor.shape)}, this dictionary takes {_written(wanted)}"
                )
        return new

    def to(self, device: torch.device | str) -> Dictionary:
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, whatever the number of processes there: copies on the CPU. Where the
        dictionary is sharded every process must ask for it at once, for each has a part."""
        copies = {
            name: self._collected(tensor) if name in self.names else tensor.to("cpu", copy=True)
            for name, tensor in self._tensors.items()
        }
        return {**copies, "count": self.count, "filled": self._filled, "head": self._head}

    def _collected(self, tensor: Tensor) -> Tensor:
        """A memory of all processes on the CPU, a few rows after the others."""
        if self.sharding.world == 1:
            return tensor.to("cpu", copy=True)
        whole = torch.empty(self.capacity, *tensor.shape[1:], dtype=tensor.dtype)
        world = self.sharding.world
        for rows in chunks(len(tensor), SAVED_AT_ONCE):
            (part,) = gather([tensor[rows]])  # one process after the other
            in_order = part.view(world, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)
            whole[rows.start * world : rows.stop * world] = in_order.cpu()
        return whole

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        expected = {*self._tensors, "count", "filled", "head"}
        if missing := expected - state.keys():
            raise CheckpointError(
                f"the checkpoint's dictionary lacks {', '.join(sorted(missing))}: it is damaged or from another "
                "version, use another checkpoint"
            )
        for name in ("ids", *self.names):
            saved, own = tuple(state[name].shape), (self.capacity, *self._tensors[name].shape[1:])
            if saved != own:
                key = {"ids": "dictionary.size", "backbone": "model.backbone"}.get(name, "model.projection")
                raise CheckpointError(
                    f"the checkpoint's dictionary has {name} of shape {_written(saved)}, this run's has "
                    f"{_written(own)}: use the {key} the checkpoint was made with, or start a new run"
                )
        for name, tensor in self._tensors.items():
            tensor.copy_(self.sharding.of(state[name]) if name in self.names else state[name])
        self.count, self._filled, self._head = state["count"], state["filled"], state["head"]


def _shape(width: int | tuple[int, ...]) -> tuple[int, ...]:
    return (width,) if isinstance(width, int) else width


def _written(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
