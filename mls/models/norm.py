"""Batch normalisation on the key side. A query and its key must not share batch statistics, else the network can
find the pair by them instead of by content (MoCo, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mls import distributed

Encode = Callable[[Tensor], tuple[Tensor, ...]]  # images to any number of outputs, one row an image


class KeyNorm:
    """Runs the key encoder under one of the modes

    - shuffle: images are exchanged between the processes before the key encoder, keys are brought back after it
    - split: images are put in random groups of `group`, each normalised by itself (what `shuffle` is with one process)
    - sync: statistics over all processes' images
    - none: each process' own batch

    A `network` without batch normalisation, as transformers and ConvNeXts are, gives each image the same key in any
    company: then it is none.
    """

    def __init__(self, mode: str, group: int, network: nn.Module | None = None) -> None:
        self.note = ""
        if network is not None and mode != "none" and not has_batch_norm(network):
            self.note = f"model.key_norm={mode} has nothing to do: there is no batch normalisation"
            mode = "none"
        if mode == "shuffle" and distributed.world() == 1:
            self.note = "model.key_norm=shuffle needs several processes: with one it is split (random groups of images)"
            mode = "split"
        self.mode = mode
        self.group = group
        if mode == "sync" and network is not None:
            share_statistics(network)

    def __call__(self, encode: Encode, images: Tensor, stream: torch.Generator | Tensor) -> tuple[Tensor, ...]:
        """`stream` must be the same on all processes: random numbers, or an order of all images that is drawn already
        (torch.compile follows no generator)."""
        if self.mode == "split":
            return self._split(encode, images, stream)
        if self.mode == "shuffle":
            return self._shuffle(encode, images, stream)
        return encode(images)

    def _split(self, encode: Encode, images: Tensor, stream: torch.Generator | Tensor) -> tuple[Tensor, ...]:
        order = _order(len(images), stream).to(images.device, non_blocking=True)
        groups = images[order].tensor_split(max(1, len(images) // self.group))
        outputs = [encode(group.contiguous(memory_format=_format(images))) for group in groups]
        back = order.argsort()
        return tuple(torch.cat(parts)[back] for parts in zip(*outputs, strict=True))

    def _shuffle(self, encode: Encode, images: Tensor, stream: torch.Generator | Tensor) -> tuple[Tensor, ...]:
        own = slice(distributed.rank() * len(images), (distributed.rank() + 1) * len(images))
        (of_all,) = distributed.gather([images])
        order = _order(len(of_all), stream).to(images.device, non_blocking=True)
        outputs = encode(of_all[order[own]].contiguous(memory_format=_format(images)))
        back = order.argsort()[own]
        return tuple(output[back] for output in distributed.gather(outputs))


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _order(count: int, stream: torch.Generator | Tensor) -> Tensor:
    return stream if isinstance(stream, Tensor) else torch.randperm(count, generator=stream)


def _format(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def share_statistics(module: nn.Module) -> None:
    """Turn every batch normalisation inside a key encoder into one over all processes. No gradient flows there, so a
    plain reduction does, on CPU as well (torch's SyncBatchNorm is for GPUs only)."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = SharedNorm2d
        elif isinstance(child, nn.BatchNorm1d):
            child.__class__ = SharedNorm1d


class _SharedNorm(nn.modules.batchnorm._BatchNorm):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world() == 1:
            return super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.float()
        mean = distributed.mean(wide.mean(dims))
        shape = [1, -1] + [1] * (x.dim() - 2)
        variance = distributed.mean((wide - mean.view(shape)).square().mean(dims))
        count = x.numel() / x.shape[1] * distributed.world()
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / (count - 1), share)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)


class SharedNorm2d(_SharedNorm, nn.BatchNorm2d):
    pass


class SharedNorm1d(_SharedNorm, nn.BatchNorm1d):
    pass
