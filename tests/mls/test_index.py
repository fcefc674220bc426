"""The offline index: exact while it can be, and true cosines with few neighbours missed where it cannot."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mls.core.matching import Matches
from mls.frozen import index
from mls.frozen.index import Approximate, Exact
from mls.tools.bench.searches import features


def brute_force(rows: torch.Tensor, queries: torch.Tensor, k: int) -> Matches:
    found = (F.normalize(queries, dim=1).double() @ F.normalize(rows, dim=1).double().T).topk(k, dim=1)
    return Matches(found.indices, found.values)


@pytest.mark.parametrize(("at_once", "queries_at_once"), [(1 << 14, 1 << 10), (64, 7)])
def test_the_exact_index_equals_brute_force_for_vectors_of_any_length(
    at_once: int, queries_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "ROWS", at_once)
    monkeypatch.setattr(index, "QUERIES", queries_at_once)
    rows, queries = features(500, 32, 1) * torch.arange(1, 501)[:, None], 3 * features(20, 32, 2)
    found, expected = index.build(rows).search(queries, 10), brute_force(rows, queries, 10)
    torch.testing.assert_close(found.scores.double(), expected.scores, rtol=0, atol=1e-5)
    assert (found.indices == expected.indices).float().mean() > 0.99


def test_many_rows_are_searched_through_the_approximate_index(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(index.build(features(300, 32, 1)), Exact)
    monkeypatch.setattr(index, "EXACT_UP_TO", 299)
    assert isinstance(index.build(features(300, 32, 1)), Approximate)


@pytest.mark.parametrize("width", [24, 300])
def test_the_approximate_index_gives_true_cosines_and_misses_few(width: int) -> None:
    rows, queries = features(6000, width, 1) * 2, features(50, width, 2)
    found, expected = Approximate(rows).search(queries, 10), brute_force(rows, queries, 10)
    cosines = (F.normalize(queries, dim=1)[:, None] * F.normalize(rows[found.indices], dim=2)).sum(2)
    torch.testing.assert_close(found.scores, cosines, rtol=0, atol=1e-5)
    assert (found.scores.diff(dim=1) <= 0).all()
    recall = (found.indices[:, :, None] == expected.indices[:, None]).any(2).float().mean()
    assert recall > 0.6  # a chance find would be one in six hundred
    itself = Approximate(rows).search(rows[:20], 1)
    assert itself.indices[:, 0].tolist() == list(range(20))


def test_an_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = features(2000, 16, 1), features(5, 16, 2)
    first = Approximate(rows, tmp_path / "index").search(queries, 3)
    monkeypatch.setattr(index, "_trained", lambda *_: pytest.fail("it is trained again"))
    second = Approximate(rows, tmp_path / "index").search(queries, 3)
    assert torch.equal(first.indices, second.indices)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
