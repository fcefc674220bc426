"""Named random streams. Every random draw in mls is a pure function of the seed and what it is for, so the number of
workers, the number of processes and a resume change nothing."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as ("order", epoch) or ("noise", epoch, image_id, view)."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextlib.contextmanager
def initialisation(seed: int, *part: str) -> Iterator[None]:
    """Modules that are made within it have first weights of this seed; the program's own stream is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init", *part))
        yield


def uniforms(seed: int, ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each id: row i depends on (seed, ids[i]) alone, whatever else is in the batch.

    Counter-based (splitmix64), so a whole batch costs one vectorised expression.
    """
    with np.errstate(over="ignore"):
        key = _mix(ids.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(key[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def watched(images: int, most: int = 60) -> list[int]:
    """A few images of a data set, the same in every run, in which people look at what is matched."""
    return torch.randperm(images, generator=generator(0, "moments"))[:most].tolist()
