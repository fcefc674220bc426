"""The dictionary: a ring of past keys, backbone and projection rows side by side, with the image and the crop they
came from. It only remembers; which rows match a query is in matching.py, what follows from it in losses/."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mls.errors import CheckpointError, ConfigError

EMPTY = -1  # the id of a slot that was never written


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
    instead, so all hold the same rows and any one of them can save for all.

    >>> from torch.nn.functional import normalize
    >>> dictionary = Dictionary(4, backbone=8, projection=2)
    >>> for step in range(3):
    ...     keys = normalize(torch.randn(2, 8)), normalize(torch.randn(2, 2))
    ...     dictionary.enqueue(*keys, ids=torch.tensor([2 * step, 2 * step + 1]))
    >>> dictionary.rows().ids.tolist(), (dictionary.count - dictionary.rows().ages).tolist()
    ([4, 5, 2, 3], [0, 0, 1, 1])
    """

    def __init__(self, size: int, backbone: int, projection: int, device: torch.device | str | None = None) -> None:
        if size < 1:
            raise ConfigError(f"dictionary.size {size} holds no rows: set dictionary.size to 1 or more")
        self.capacity = size
        self.count = 0  # enqueues so far
        self._filled = 0
        self._head = 0
        self._memory = Rows(
            backbone=torch.zeros(size, backbone, device=device),
            projection=torch.zeros(size, projection, device=device),
            ids=torch.full((size,), EMPTY, dtype=torch.int64, device=device),
            boxes=torch.full((size, 4), torch.nan, device=device),
            ages=torch.zeros(size, dtype=torch.int64, device=device),
        )

    def __len__(self) -> int:
        return self._filled

    @property
    def filled(self) -> int:
        """How many rows hold a key; at most `capacity`."""
        return self._filled

    def rows(self) -> Rows:
        """The filled part, in slot order (not in order of age)."""
        return Rows(**{name: memory[: self._filled] for name, memory in vars(self._memory).items()})

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
            boxes = self._memory.boxes.new_full((len(ids), 4), torch.nan)
        new = Rows(backbone, projection, ids, boxes, ages=torch.full_like(ids, self.count + 1))
        self._check(new)
        kept = min(len(ids), self.capacity)
        before_end = min(kept, self.capacity - self._head)
        for name, memory in vars(self._memory).items():
            source = vars(new)[name][len(ids) - kept :]
            memory[self._head : self._head + before_end].copy_(source[:before_end])
            memory[: kept - before_end].copy_(source[before_end:])
        self._head = (self._head + kept) % self.capacity
        self._filled = min(self._filled + kept, self.capacity)
        self.count += 1

    def to(self, device: torch.device | str) -> "Dictionary":
        self._memory = Rows(**{name: memory.to(device) for name, memory in vars(self._memory).items()})
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs: copies on the CPU, the same on every process."""
        copies = {name: memory.to("cpu", copy=True) for name, memory in vars(self._memory).items()}
        return {**copies, "count": self.count, "filled": self._filled, "head": self._head}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        expected = {*vars(self._memory), "count", "filled", "head"}
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
            saved, own = tuple(state[name].shape), tuple(vars(self._memory)[name].shape)
            if saved != own:
                raise CheckpointError(
                    f"the checkpoint's dictionary has {name} of shape {_shape(saved)}, this run's has {_shape(own)}: "
                    f"use the {key} the checkpoint was made with, or start a new run"
                )
        for name, memory in vars(self._memory).items():
            memory.copy_(state[name])
        self.count, self._filled, self._head = state["count"], state["filled"], state["head"]

    def _check(self, new: Rows) -> None:
        """copy_ would broadcast a row of the wrong width in silence."""
        for name, memory in vars(self._memory).items():
            wanted, given = (len(new.ids), *memory.shape[1:]), tuple(vars(new)[name].shape)
            if given != wanted:
                raise ValueError(f"enqueue got {name} of shape {_shape(given)}, this dictionary takes {_shape(wanted)}")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
