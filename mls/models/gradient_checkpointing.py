"""Gradient checkpointing (https://arxiv.org/abs/1604.06174): of each block only its input is kept for the backward
pass, which computes the block once more. Gradients are the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mls.errors import ConfigError
from mls.models.stages import blocks


def checkpoint_blocks(backbone: nn.Module) -> None:
    """In place. Names and tensors stay, and what runs without gradient is as before."""
    found = blocks(backbone)
    if not found:
        raise ConfigError(
            f"{type(backbone).__name__} has no blocks that could be computed twice: set engine.checkpointing=false"
        )
    for block in found:
        kind = type(block)
        block.__class__ = type(kind.__name__, (_Checkpointed, kind), {})  # so that copies are checkpointed, too


class _Checkpointed(nn.Module):
    def forward(self, *args: Any, **options: Any) -> Any:
        run = super().forward
        if not torch.is_grad_enabled():
            return run(*args, **options)
        if torch.compiler.is_compiling():  # a graph moves statistics once, however often it computes
            return checkpoint(run, *args, use_reentrant=False, **options)
        contexts = lambda: (nullcontext(), _without_statistics(self))
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """The second pass normalises by its batch as the first, and moves no mean once more."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
