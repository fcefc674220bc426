"""For every image of a data set a list of other images with scores, best first: where pseudo-labels come from that do
not depend on the step's own features. On disk one safetensors file, read through a memory map; which images are
neighbours is regions.py's business."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float16, Int16, Int32, Int64
from torch import Tensor

from mls.core.matching import Matches
from mls.errors import CheckpointError, reason
from mls.files import write_atomically
from mls.streams import watched


@dataclass(frozen=True)
class NeighbourLists:
    ids: Int32[Tensor, "images neighbours"]
    scores: Float16[Tensor, "images neighbours"]
    identity: dict[str, Any]  # plain values: of which weights, which data, made how
    # For people: of the `watched` images and each of their neighbours the numbers of the two regions most alike.
    regions: Int16[Tensor, "watched neighbours 2"] | None = None

    @classmethod
    def of(cls, found: Matches, identity: dict[str, Any], regions: Tensor | None = None) -> NeighbourLists:
        return cls(found.indices.int(), found.scores.half(), identity, None if regions is None else regions.short())

    @property
    def tensors(self) -> dict[str, Tensor]:
        regions = {} if self.regions is None else {"regions": self.regions}
        return {name: one.cpu() for name, one in {"ids": self.ids, "scores": self.scores, **regions}.items()}

    def save(self, path: Path) -> None:
        from safetensors.torch import save

        tensors = {name: one.contiguous() for name, one in self.tensors.items()}
        about = {"identity": json.dumps(self.identity, sort_keys=True)}
        write_atomically(path, save(tensors, about | {"sha256": self._hash()}))

    def _hash(self) -> str:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode())
        for tensor in self.tensors.values():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def open(cls, path: Path) -> NeighbourLists:
        """Read through a memory map."""
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                names = {"ids", "scores", *file.keys()}
                lists = cls(identity=json.loads(about["identity"]), **{one: file.get_tensor(one) for one in names})
        except Exception as error:  # the file system's errors, safetensors' own, and a file of other tensors
            raise CheckpointError(
                f"{path} holds no neighbour lists ({reason(error)}): `mls regions` writes them"
            ) from None
        of_regions = (len(watched(len(lists.ids))), *lists.ids.shape[1:], 2)
        odd = lists.regions is not None and lists.regions.shape != of_regions
        if odd or about.get("sha256") not in (None, lists._hash()):  # the first lists had none
            raise CheckpointError(f"{path} is damaged: make it again with `mls regions`")
        return lists

    def to(self, device: torch.device | str) -> NeighbourLists:
        regions = None if self.regions is None else self.regions.to(device)
        return NeighbourLists(self.ids.to(device), self.scores.to(device), self.identity, regions)

    def most_alike(
        self, queries: Int64[Tensor, "batch"], images: Int64[Tensor, "batch count"]
    ) -> Int64[Tensor, "batch count 2"] | None:
        """The numbers of a query's region and of an image's that are most alike; -1: not known of these two."""
        if self.regions is None:
            return None
        of_query = queries[:, None] == torch.tensor(watched(len(self.ids)), device=queries.device)  # [batch, watched]
        in_list = self.ids[queries][:, None] == images[:, :, None]  # [batch, count, neighbours]
        found = self.regions[of_query.int().argmax(1)[:, None], in_list.int().argmax(2)].long()
        return found.masked_fill(~(of_query.any(1)[:, None] & in_list.any(2))[:, :, None], -1)

    def least(self, average: float) -> float:
        """The score that so many neighbours of an image reach on average.

        >>> found = Matches(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[0.9, 0.7], [0.9, 0.2]]))
        >>> lists = NeighbourLists.of(found, {})
        >>> round(lists.least(1.5), 1)
        0.7
        """
        above = max(1, round(average * len(self.ids)))
        if above >= self.scores.numel():
            return -float("inf")
        return float(self.scores.flatten().float().topk(above).values[-1])

    def among(
        self,
        queries: Int64[Tensor, "batch"],
        rows: Int64[Tensor, "rows"],
        k: int,
        least: float | None = None,
        epoch: int | None = None,
    ) -> Matches:
        """Of rows that belong to the images `rows`, up to k whose images are in a query's list, best first; with
        `least` all that reach this score. The score of a place that stands for no row is -inf. `epoch`: after how many
        rows an image may come again; by default when all have come.

        >>> found = Matches(torch.tensor([[2, 1], [2, 0]]), torch.tensor([[0.9, 0.5], [0.8, 0.5]]))
        >>> lists = NeighbourLists.of(found, {})
        >>> lists.among(torch.tensor([0]), rows=torch.tensor([1, 0, 2, 0, 2]), k=2).indices
        tensor([[2, 4]])
        """
        wanted, scores = self.ids[queries].long(), self.scores[queries].float()  # [batch, neighbours]
        order = rows.argsort(stable=True)
        sorted_rows = rows[order]
        first, last = (torch.searchsorted(sorted_rows, wanted, right=right) for right in (False, True))
        # An image that is several times among the rows, which a dictionary longer than an epoch has.
        times = torch.arange(len(rows) // (epoch or len(self.ids)) + 2, device=rows.device)
        places = first[:, :, None] + times  # [batch, neighbours, times]
        there = places < last[:, :, None]
        if least is not None:
            there &= (scores >= least)[:, :, None]
        slots = order[places.clamp(max=len(rows) - 1)].flatten(1)
        scores = scores[:, :, None].masked_fill(~there, -torch.inf).flatten(1)
        best = scores.sort(dim=1, descending=True, stable=True)
        kept = slice(None) if least is not None else slice(k)
        return Matches(slots.gather(1, best.indices)[:, kept], best.values[:, kept])
