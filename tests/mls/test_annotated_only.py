"""Every loss can leave out what nobody annotated, in one way: as if it were not there."""

import pytest
import torch

from mls.core import losses

COUNT_ALL = {"epr", "role", "pairwise_rank", "crisp", "co_teaching", "jocor"}  # of a sample's classes, unknown ones too
NEVER = COUNT_ALL | {"curriculum"}  # which weighs a sample by what is known of it
COUNTS_CLASSES = {"dw", "wan"}  # a negative's weight is 1 / (classes - 1)
USABLE = [name for name in losses.names() if name not in NEVER]


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(3)
    outputs = torch.randn(6, 9, generator=draws, dtype=torch.float64).mul(2)
    labels = torch.randint(0, 2, (6, 9), generator=draws) * 2 - 1
    return outputs.tanh() if name == "hml" else outputs, labels


@pytest.mark.parametrize("name", USABLE)
def test_columns_without_annotation_are_as_if_they_were_not_there(name: str) -> None:
    outputs, labels = case(name)
    unknown = torch.tensor([1, 4, 8])
    known = torch.tensor([0, 2, 3, 5, 6, 7])
    labels[:, unknown] = 0
    loss = losses.build(name)
    found = loss.annotated_only(outputs, labels)
    if name not in COUNTS_CLASSES:
        torch.testing.assert_close(found, loss(outputs[:, known], labels[:, known]))
    others = outputs.clone()
    others[:, unknown] = case(name)[0].flip(0)[:, unknown]
    torch.testing.assert_close(loss.annotated_only(others, labels), found)


@pytest.mark.parametrize("name", USABLE)
def test_single_unknown_labels_get_no_gradient_and_a_full_matrix_changes_nothing(name: str) -> None:
    outputs, labels = case(name)
    loss = losses.build(name)
    torch.testing.assert_close(loss.annotated_only(outputs, labels), loss(outputs, labels))
    unknown = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    unknown[0] = True  # a sample of which nothing is known
    outputs.requires_grad_()
    loss.annotated_only(outputs, labels.masked_fill(unknown, 0)).backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()
    assert (outputs.grad[unknown] == 0).all()
    assert (outputs.grad[~unknown] != 0).any()


def test_two_way_leaves_out_what_its_own_option_leaves_out() -> None:
    outputs, labels = case("two_way")
    labels[::2, ::3] = 0
    own = losses.build("two_way", ignore_unknown=True)(outputs, labels)
    torch.testing.assert_close(losses.build("two_way").annotated_only(outputs, labels), own)


def test_losses_that_cannot_say_so() -> None:
    assert {name for name in losses.names() if not losses.LOSSES[name].can_leave_out_unknown()} == NEVER
