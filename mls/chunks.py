"""Sizes: how many rows of a large array fit into a budget of memory, its parts, a few rows of many, powers of two."""

from __future__ import annotations

from collections.abc import Iterator


def rows_within(budget: int, per_row: int) -> int:
    """How many rows of `per_row` entries fit into a budget of entries; at least one.

    >>> rows_within(1 << 21, 1000), rows_within(10, 1000)
    (2097, 1)
    """
    return max(1, budget // max(1, per_row))


def chunks(count: int, size: int) -> Iterator[slice]:
    """Consecutive parts of `count` rows, of `size` rows each; the last one may be smaller.

    >>> list(chunks(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def spaced(count: int, most: int) -> list[int]:
    """Of `count` rows at most so many, evenly spaced.

    >>> spaced(9, 3), spaced(2, 3)
    ([0, 4, 8], [0, 1])
    """
    step = (count - 1) / max(1, min(count, most) - 1)
    return [round(number * step) for number in range(min(count, most))]


def power_of_two(most: float) -> int:
    """The largest that is no larger, and at least 1.

    >>> power_of_two(100), power_of_two(0.5)
    (64, 1)
    """
    return 1 << max(0, int(most).bit_length() - 1)
