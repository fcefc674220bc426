"""Every matcher against a brute-force answer in numpy. Vectors are of small integers: every product is exact, so
scores can be compared without tolerance and ties are frequent."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mls.core import matching
from mls.core.matching import TorchMatcher
from mls.core.products import OwnRows
from mls.errors import ConfigError, UserError


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
    """Queries, rows, k, and which rows are excluded (always leaving k)."""
    batch, rows, dim = draw(st.integers(0, 4)), draw(st.integers(1, 30)), draw(st.integers(1, 5))
    integers = st.integers(-50, 50)
    queries = draw(arrays.arrays(np.float32, (batch, dim), elements=integers))
    memory = draw(arrays.arrays(np.float32, (rows, dim), elements=integers))
    k = draw(st.integers(1, rows))
    if not draw(st.booleans()):
        return queries, memory, k, None
    exclude = np.zeros((batch, rows), dtype=bool)
    for row in exclude:
        row[draw(st.lists(st.integers(0, rows - 1), max_size=rows - k, unique=True))] = True
    return queries, memory, k, exclude


def brute_force(queries: np.ndarray, rows: np.ndarray, exclude: np.ndarray | None) -> np.ndarray:
    scores = np.einsum("bd,rd->br", queries.astype(np.float64), rows.astype(np.float64))
    return scores if exclude is None else np.where(exclude, -np.inf, scores)


@pytest.mark.parametrize("name", matching.names())
@settings(deadline=None, max_examples=150)
@given(problem=problems(), chunk=st.integers(1, 40))
def test_matches_equal_brute_force_however_the_rows_are_chunked(name: str, problem: tuple, chunk: int) -> None:
    queries, rows, k, exclude = problem
    mask = None if exclude is None else torch.from_numpy(exclude)
    matches = matching.build(name, chunk=chunk).topk(torch.from_numpy(queries), torch.from_numpy(rows), k, mask)
    everything = brute_force(queries, rows, exclude)
    order = np.argsort(-everything, axis=1, kind="stable")
    ranked = np.take_along_axis(everything, order, axis=1)
    assert matches.indices.shape == matches.scores.shape == (len(queries), k)
    assert matches.indices.dtype == torch.int64
    np.testing.assert_array_equal(matches.scores.numpy(), ranked[:, :k])

    found = matches.indices.numpy()
    np.testing.assert_array_equal(np.take_along_axis(everything, found, axis=1), ranked[:, :k])
    assert all(len(set(row)) == k for row in found.tolist())  # no row twice, in a tie neither
    gaps = np.pad(-np.diff(ranked.clip(min=-1e9), axis=1), ((0, 0), (1, 1)), constant_values=1.0)
    alone = (gaps[:, :-1] > 1e-5) & (gaps[:, 1:] > 1e-5)
    np.testing.assert_array_equal(found[alone[:, :k]], order[:, :k][alone[:, :k]])


def test_chunked_equals_unchunked_on_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(32, 64, generator=generator), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(1000, 64, generator=generator), dim=1)
    whole = TorchMatcher(chunk=1000).topk(queries, rows, 20)
    for chunk in (7, 19, 333, 999):
        parts = TorchMatcher(chunk=chunk).topk(queries, rows, 20)
        assert torch.allclose(parts.scores, whole.scores, atol=1e-6)
        differ = parts.indices != whole.indices
        assert ((whole.scores[differ] - parts.scores[differ]).abs() <= 1e-5).all()
        assert differ.float().mean() < 0.01


@pytest.mark.parametrize("dim", [64, 2048])
def test_back_ends_agree_on_unit_vectors(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    queries = torch.nn.functional.normalize(torch.randn(64, dim, generator=generator), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(3000, dim, generator=generator), dim=1)
    one, other = (matching.build(name).topk(queries, rows, 20) for name in ("torch", "faiss"))
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-5)
    differ = one.indices != other.indices
    gaps = torch.nn.functional.pad(-one.scores.diff(dim=1), (1, 1), value=1.0)
    assert (torch.minimum(gaps[:, :-1], gaps[:, 1:])[differ] <= 1e-5).all()
    assert differ.float().mean() < 0.01


@pytest.mark.parametrize("name", matching.names())
def test_rows_of_the_same_image_are_left_out_by_their_numbers(name: str) -> None:
    queries, rows = torch.eye(3), torch.eye(3).repeat(2, 1)
    own = OwnRows(torch.tensor([10, 11, 12]), torch.tensor([10, 0, 12, 1, 11, 2]))
    assert matching.build(name, chunk=2).topk(queries, rows, 1, own).indices.tolist() == [[3], [1], [5]]


@pytest.mark.parametrize("name", matching.names())
def test_bf16_vectors_and_autocast_are_scored_in_fp32(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(4, 64, generator=generator), torch.randn(50, 64, generator=generator)
    expected = brute_force(queries.numpy(), rows.numpy(), None).max(axis=1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = matching.build(name).topk(queries, rows, 1).scores
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores[:, 0].numpy(), expected, rtol=1e-5)

    half = matching.build(name, chunk=7).topk(queries.bfloat16(), rows.bfloat16(), 1).scores
    exact = brute_force(queries.bfloat16().float().numpy(), rows.bfloat16().float().numpy(), None).max(axis=1)
    np.testing.assert_allclose(half[:, 0].numpy(), exact, rtol=1e-5)


@pytest.mark.parametrize("name", matching.names())
def test_matching_leaves_no_graph(name: str) -> None:
    matches = matching.build(name, chunk=2).topk(torch.randn(2, 3, requires_grad=True), torch.randn(5, 3), 3)
    assert not matches.scores.requires_grad


@pytest.mark.parametrize("name", matching.names())
@pytest.mark.parametrize("k", [0, 6])
def test_k_that_the_rows_cannot_answer_is_a_users_error(k: int, name: str) -> None:
    with pytest.raises(UserError, match=f"k = {k} matches cannot be found among 5 rows: choose k from 1 to 5"):
        matching.build(name).topk(torch.zeros(1, 2), torch.zeros(5, 2), k)


@pytest.mark.parametrize("chunk", [2, 100])
def test_excluding_more_than_leaves_k_gives_scores_of_minus_infinity_not_a_forbidden_match(chunk: int) -> None:
    exclude = torch.zeros(2, 5, dtype=torch.bool)
    exclude[1, :3] = True
    matcher = TorchMatcher(chunk=chunk)
    assert set(matcher.topk(torch.ones(2, 2), torch.ones(5, 2), 2, exclude).indices[1].tolist()) == {3, 4}
    scores = matcher.topk(torch.ones(2, 2), torch.ones(5, 2), 3, exclude).scores
    assert scores[1].tolist() == [2.0, 2.0, -torch.inf]


def test_build_makes_every_matcher_it_lists() -> None:
    for name in matching.names():
        indices = matching.build(name).topk(torch.eye(3), torch.eye(3), 1).indices
        assert indices.tolist() == [[0], [1], [2]]


def test_unknown_names_and_options_name_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        matching.build("torhc")
    with pytest.raises(ConfigError, match="option of matcher torch 'chunks': did you mean 'chunk'"):
        matching.build("torch", chunks=3)
    with pytest.raises(ConfigError, match="set chunk to 1 or more"):
        matching.build("torch", chunk=0)


def test_without_faiss_asking_for_it_is_one_sentence_and_auto_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="matching.backend=faiss needs faiss, .* or use matching.backend=torch"):
        matching.build("faiss")
    assert list(matching.seconds_of_each(torch.eye(3), torch.eye(3), 1)) == ["torch"]


def test_the_back_ends_are_measured_fastest_first() -> None:
    measured = matching.seconds_of_each(torch.randn(8, 16), torch.randn(500, 16), 5, rounds=3)
    assert set(measured) == set(matching.names())
    assert list(measured.values()) == sorted(measured.values())


def test_faiss_comes_with_the_matcher_that_needs_it_and_not_before() -> None:
    code = "import sys, mls, mls.engine; from mls import matching; print('faiss' in sys.modules)"
    code += "; matching.build('faiss'); print('faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
