"""What a training sees of the truth: the published draws repeated number by number, and what each regime keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mls.errors import ConfigError
from mls.eval.regimes import REGIMES, observe, split

TEN = torch.tensor([[2 * int(bit) - 1 for bit in f"{(i * 37 + 11) % 64:06b}"] for i in range(10)], dtype=torch.int8)

shapes = array_shapes(min_dims=2, max_dims=2, max_side=8)
truths = arrays(np.int8, shapes, elements=st.sampled_from([-1, 0, 1])).map(torch.from_numpy)
shares = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)


def below(rng: np.random.RandomState, highest: int) -> int:
    """A number from 0 to `highest`: 32-bit draws, cut to as many bits, until one is not too large."""
    bits = (1 << highest.bit_length()) - 1
    while True:
        drawn = int(rng.randint(0, 2**32, dtype=np.uint32)) & bits
        if drawn <= highest:
            return drawn


def shuffled(rng: np.random.RandomState, items: list[int]) -> list[int]:
    """The legacy shuffle of NumPy: from the last place down, each item swaps with one at or before its place."""
    for last in range(len(items) - 1, 0, -1):
        other = below(rng, last)
        items[last], items[other] = items[other], items[last]
    return items


def published(truth: list[list[int]], seed: int) -> list[list[int]]:
    """The generator of the papers, one positive and no negative an image, without NumPy's shuffle."""
    rng = np.random.RandomState(seed)
    observed = []
    for labels in truth:
        positives = shuffled(rng, [j for j, label in enumerate(labels) if label == 1])
        shuffled(rng, [j for j, label in enumerate(labels) if label == -1])
        observed.append([int(j in positives[:1]) for j in range(len(labels))])
    return observed


@given(truths, seeds)
def test_the_single_positive_is_the_published_one(truth, seed):
    assert observe(truth, "single_positive", 0, seed).tolist() == published(truth.tolist(), seed)


def test_the_published_stream_is_pinned():
    drawn = observe(TEN, "single_positive", 0)
    assert drawn.sum(1).tolist() == [1] * 10
    assert drawn.argmax(1).tolist() == [2, 0, 3, 0, 3, 3, 0, 3, 4, 2]


def test_later_rows_do_not_change_what_earlier_rows_show():
    assert torch.equal(observe(TEN[:6], "single_positive", 0), observe(TEN, "single_positive", 0)[:6])


@given(truths, seeds)
def test_one_positive_all_negatives_shows_the_same_positive_and_every_negative(truth, seed):
    both = observe(truth, "one_positive_all_negatives", 0, seed)
    single = observe(truth, "single_positive", 0, seed)
    assert torch.equal(both == 1, single == 1)
    assert torch.equal(both == -1, truth == -1)


@given(truths, shares, seeds, st.sampled_from(sorted(REGIMES)))
def test_what_is_seen_is_true_and_the_same_when_asked_again(truth, share, seed, regime):
    before = truth.clone()
    seen = observe(truth, regime, share, seed)
    assert seen.dtype == torch.int8
    assert torch.equal(seen[seen != 0], truth[seen != 0])
    assert torch.equal(observe(truth, regime, share, seed), seen)
    seen.zero_()
    assert torch.equal(truth, before)


@given(truths, shares, seeds)
def test_partial_positives_keep_at_least_one_and_no_negative(truth, share, seed):
    seen = observe(truth, "partial_positives", share, seed)
    assert not (seen == -1).any()
    assert torch.equal((seen == 1).any(1), (truth == 1).any(1))


@given(truths, shares, shares, seeds, st.sampled_from(["partial_positives", "partial_labels"]))
def test_a_larger_proportion_keeps_all_that_a_smaller_one_does(truth, one, other, seed, regime):
    fewer, more = (observe(truth, regime, share, seed) for share in sorted([one, other]))
    assert torch.equal(more[fewer != 0], fewer[fewer != 0])


@given(truths, seeds)
def test_the_ends_of_the_proportions(truth, seed):
    assert torch.equal(observe(truth, "full", 0, seed), truth)
    assert torch.equal(observe(truth, "partial_labels", 1, seed), truth)
    assert not observe(truth, "partial_labels", 0, seed).any()
    assert torch.equal(observe(truth, "partial_positives", 1, seed), truth.clamp(min=0))
    assert observe(truth, "partial_positives", 0, seed).sum(1).max() <= 1


def test_about_the_proportion_is_kept():
    truth = torch.where(torch.arange(200 * 100).reshape(200, 100) % 3 == 0, 1, -1).to(torch.int8)
    seen = observe(truth, "partial_labels", 0.3)
    for sign in (1, -1):
        # 5 deviations of a share of at least 6,667 labels
        assert (seen[truth == sign] != 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert observe(truth, "partial_positives", 0.3)[truth == 1].float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_another_seed_draws_other_labels():
    truth = torch.ones(50, 20, dtype=torch.int8)
    for regime in ["single_positive", "one_positive_all_negatives", "partial_positives", "partial_labels"]:
        assert not torch.equal(observe(truth, regime, 0.5, 1), observe(truth, regime, 0.5, 2))


def test_an_unknown_regime_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown label regime 'single': did you mean 'single_positive'"):
        observe(TEN, "single", 0)


@given(st.integers(0, 300), shares, seeds)
def test_the_split_holds_out_the_last_of_a_permutation(count, share, seed):
    order = np.random.RandomState(seed).permutation(count).tolist()
    held_out = round(share * count)
    train, val = split(count, share, seed)
    assert val.tolist() == sorted(order[count - held_out :])
    assert train.tolist() == sorted(order[: count - held_out])
    assert train.dtype == val.dtype == torch.int64


@pytest.mark.parametrize("sizes", [(4574, 1143), (65665, 16416), (120000, 30000), (4795, 1199)])
def test_the_split_of_voc_coco_nus_wide_and_cub_has_the_published_sizes(sizes):
    train, val = split(sum(sizes))
    assert (len(train), len(val)) == sizes
