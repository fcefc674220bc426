"""Schedules as pure functions of the step (counted from 1): nothing to save, nothing to reset on resume."""

import math
from collections.abc import Sequence


def cosine(step: int, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine down to `final`.

    >>> [round(cosine(step, total=4), 3) for step in (1, 2, 3, 4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    if step <= warmup:
        return step / warmup
    progress = (step - 1 - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def stepwise(step: int, falls: Sequence[int], warmup: int = 0) -> float:
    """The same for a rate that falls to a tenth after each of the steps in `falls`; without any it is constant.

    >>> [stepwise(step, falls=[3, 4], warmup=2) for step in (1, 2, 3, 4, 5)]
    [0.5, 1.0, 1.0, 0.1, 0.01]
    """
    if step <= warmup:
        return step / warmup
    return 10.0 ** -sum(step > fall for fall in falls)


def between(step: int, total: int, first: float, last: float) -> float:
    """From `first` to `last` along half a cosine, as BYOL's momentum and DINO's weight decay go; step counts from 1.

    >>> [round(between(step, 4, 0.99, 1.0), 4) for step in (1, 3, 4, 5)]
    [0.99, 0.995, 0.9985, 1.0]
    """
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / total)))


def epoch_of(step: int, steps_per_epoch: int) -> int:
    """The epoch a step belongs to; both count from 1."""
    return (step - 1) // steps_per_epoch + 1
