"""The dictionary: a ring of past keys, backbone and projection rows side by side, with the image and the crop they
came from. It only remembers; which rows match a query is in matching.py, what follows from it in losses/, which process
holds which rows in sharding.py."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mls.core.sharding import WHOLE, Sharding
from mls.distributed import gather
from mls.errors import CheckpointError, ConfigError

EMPTY = -1  # the id of a slot that was never written
STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MEMORIES = ("backbone", "projection")  # what is sharded; ids, boxes and ages are small, every process has them all
SAVED_AT_ONCE = 4096  # rows of each process that are together on one device while a sharded dictionary is saved


@dataclass(frozen=True)
class Rows:
    """Row i of every field belongs to the same key. The fields are views: the next enqueue writes into them."""

    backbone: Float[Tensor, "rows features"]
    projection: Float[Tensor, "rows projection"]
    ids: Int64[Tensor, "rows"]  # the images' numbers
    boxes: Float[Tensor, "rows 4"]  # the crops' places in their images; NaN where none was given
    ages: Int64[Tensor, "rows"]  # the enqueue that wrote the row, from 1; `count - ages` is how many came since


class Dictionary:
    """Both memories in one ring with one write head, so that rows can never come out of step.

    Not an nn.Module, and its tensors are no buffers: DDP broadcasts every buffer from rank 0 at every forward, and for
    65536 x 2048 rows that alone took 230 ms a step (4 ms without). Every process enqueues the same gathered keys
    instead, so all hold the same rows and any one of them can save for all. With a `sharding` over several processes
    each holds its part of the two memories. `storage` is how they are kept; products are taken in fp32.

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
        backbone: int,
        projection: int,
        device: torch.device | str | None = None,
        storage: str = "fp32",
        sharding: Sharding = WHOLE,
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
        here, dtype = size // sharding.world, STORAGE[storage]
        self._memory = {  # as in Rows
            "backbone": torch.zeros(here, backbone, device=device, dtype=dtype),
            "projection": torch.zeros(here, projection, device=device, dtype=dtype),
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
    def ids(self) -> Int64[Tensor, "slots"]:
        """The images of all filled slots, of all processes."""
        return self._memory["ids"][: self._filled]

    def rows(self) -> Rows:
        """The filled part that this process holds, in slot order (not in order of age)."""
        here = self.sharding.held(self._filled)
        part = {
            name: memory[:here] if name in MEMORIES else self.sharding.of(memory)[:here]
            for name, memory in self._memory.items()
        }
        return Rows(**part)

    @torch.no_grad()
    def enqueue(
        self,
        backbone: Float[Tensor, "batch features"],
        projection: Float[Tensor, "batch projection"],
        ids: Int64[Tensor, "batch"],
        boxes: Float[Tensor, "batch 4"] | None = None,
    ) -> None:
        """Writes a batch of any size over the oldest rows; of a batch larger than the ring the last rows stay.

        Rows are stored as they come: normalise them before. Autograd notices a write between a forward that used
        `rows()` and its backward, and refuses.
        """
        if boxes is None:
            boxes = self._memory["boxes"].new_full((len(ids), 4), torch.nan)
        new = Rows(backbone, projection, ids, boxes, ages=torch.full_like(ids, self.count + 1))
        self._check(new)
        kept = min(len(ids), self.capacity)
        for name, memory in self._memory.items():
            source, head = vars(new)[name][len(ids) - kept :], self._head
            if name in MEMORIES:
                source, head = self.sharding.share_of(source, head)
            before_end = min(len(source), len(memory) - head)
            memory[head : head + before_end].copy_(source[:before_end])
            memory[: len(source) - before_end].copy_(source[before_end:])
        self._head = (self._head + kept) % self.capacity
        self._filled = min(self._filled + kept, self.capacity)
        self.count += 1

    def to(self, device: torch.device | str) -> "Dictionary":
        self._memory = {name: memory.to(device) for name, memory in self._memory.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, whatever the number of processes there: copies on the CPU. Where the
        dictionary is sharded every process must ask for it at once, for each has a part."""
        copies = {
            name: self._collected(memory) if name in MEMORIES else memory.to("cpu", copy=True)
            for name, memory in self._memory.items()
        }
        return {**copies, "count": self.count, "filled": self._filled, "head": self._head}

    def _collected(self, memory: Tensor) -> Tensor:
        """A memory of all processes on the CPU, a few rows after the others."""
        if self.sharding.world == 1:
            return memory.to("cpu", copy=True)
        whole = torch.empty(self.capacity, memory.shape[1], dtype=memory.dtype)
        for start in range(0, len(memory), SAVED_AT_ONCE):
            (part,) = gather([memory[start : start + SAVED_AT_ONCE]])  # one process after the other
            slots = slice(start * self.sharding.world, start * self.sharding.world + len(part))
            whole[slots] = part.view(self.sharding.world, -1, memory.shape[1]).transpose(0, 1).flatten(0, 1).cpu()
        return whole

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        expected = {*self._memory, "count", "filled", "head"}
        if missing := expected - state.keys():
            raise CheckpointError(
                f"the checkpoint's dictionary lacks {', '.join(sorted(missing))}: it is damaged or from another "
                "version, use another checkpoint"
            )
        for name, key in (
            ("ids", "dictionary.size"),
            ("backbone", "model.backbone"),
            ("projection", "model.projection"),
        ):
            saved, own = tuple(state[name].shape), (self.capacity, *self._memory[name].shape[1:])
            if saved != own:
                raise CheckpointError(
                    f"the checkpoint's dictionary has {name} of shape {_shape(saved)}, this run's has {_shape(own)}: "
                    f"use the {key} the checkpoint was made with, or start a new run"
                )
        for name, memory in self._memory.items():
            memory.copy_(self.sharding.of(state[name]) if name in MEMORIES else state[name])
        self.count, self._filled, self._head = state["count"], state["filled"], state["head"]

    def _check(self, new: Rows) -> None:
        """copy_ would broadcast a row of the wrong width in silence."""
        for name, memory in self._memory.items():
            wanted, given = (len(new.ids), *memory.shape[1:]), tuple(vars(new)[name].shape)
            if given != wanted:
                raise ValueError(f"enqueue got {name} of shape {_shape(given)}, this dictionary takes {_shape(wanted)}")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
