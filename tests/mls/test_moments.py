"""Moments: what a method matches for fixed queries, written beside the run and read back."""

from collections.abc import Callable
from typing import Any

import pytest

from mls.monitor import moments


def test_moments_are_read_as_they_were_written(synthetic_run: Callable[..., Any]) -> None:
    run = synthetic_run(near=lambda query: [(query + place) % 256 for place in range(1, 6)])
    found = moments.read(run.path)
    assert [moment.step for moment in found] == [2, 4, 8]
    query = found[-1].queries[0]
    assert [match.id for match in query.matches["features"]] == [(query.id + place) % 256 for place in range(1, 6)]
    moments.write(run.path, found[0])
    assert moments.read(run.path) == found
    assert moments.path_of(run.path, 2).stat().st_size < 120_000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"rows":256', '"rows":NaN'),
        ('"rows":256', '"rows":"256"'),
        ('"rows":256', '"rows":-1'),
        ('"own"', '"owned"'),
        ("{", "["),
    ],
)
def test_a_file_that_holds_no_moment_is_named_and_left_out(
    synthetic_run: Callable[..., Any], before: str, after: str
) -> None:
    run, told = synthetic_run(), []
    path = moments.path_of(run.path, 4)
    path.write_text(path.read_text().replace(before, after))
    assert [moment.step for moment in moments.read(run.path, told.append)] == [2, 8]
    assert len(told) == 1 and told[0].startswith(f"left out {path}, which holds no moment of a run: ")
