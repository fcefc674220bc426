"""Worked out a part of the rows at a time: the same values and gradients, in bounded memory, without waiting for the
device."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mls.config import Config
from mls.core import losses, methods, products
from mls.core.methods.mls import MLS
from mls.core.methods.moco import Keys, Query
from mls.core.products import OwnRows, log_sum_exp, over_parts
from mls.core.queried_rows import QueriedRows
from mls.data import Views
from mls.recipes import load_config
from mls.tools.bench.memory import peak_bytes

BATCH, WIDTH = 8, 16
SEPARABLE = [name for name in losses.names() if losses.build(name).separable and not losses.build(name).only_supervised]
DENSE = 1 << 60  # so many products at once that there is only one part


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at a time."""
    monkeypatch.setattr(products, "ENTRIES", 5 * BATCH)


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def config_of(rows: int, *overrides: str) -> Config:
    base = [f"data.batch_size={BATCH}", f"dictionary.size={rows}", "objective.k=3", f"model.projection={WIDTH}"]
    return load_config("mls_scenes_tiny", [*base, *overrides])


def method_of(rows: int, *overrides: str) -> MLS:
    config = config_of(rows, *overrides)
    method = methods.build(config)
    method.dictionary.enqueue(unit(rows, 128, 1), unit(rows, WIDTH, 2), ids=torch.arange(rows) % (rows // 2))
    assert isinstance(method, MLS)
    return method


def value_and_gradients(method: MLS, batch: int = BATCH) -> list[torch.Tensor]:
    """Of both parts of the loss for some embeddings; the first queries have rows of their own in the dictionary."""
    g, z, ids = unit(batch, 128, 3).requires_grad_(), unit(batch, WIDTH, 4).requires_grad_(), torch.arange(batch)
    views, keys = Views([], [], ids), Keys(g.detach(), z.detach(), ids, torch.zeros(batch, 4))
    rows = QueriedRows(method.dictionary, ids, method.config.dictionary.own_rows == "exclude")
    contrast = method.negatives(Query(g, z), rows, keys, views).mean()
    term = method.beside_info_nce(Query(g, z), rows, views, None)
    assert term is not None
    gradients = torch.autograd.grad(contrast + term, [g, z], allow_unused=True)
    return [contrast.detach(), term.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("loss", SEPARABLE)
@pytest.mark.parametrize("own_rows", ["keep", "exclude"])
def test_a_loss_in_parts_equals_the_loss_in_one_piece(
    loss: str, own_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of(37, f"objective.loss={loss}", f"dictionary.own_rows={own_rows}")
    whole = value_and_gradients(method)
    monkeypatch.setattr(products, "ENTRIES", 5 * BATCH)
    for one, other in zip(whole, value_and_gradients(method), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalise", ["mean", "positives", "balanced"])
@pytest.mark.parametrize("labels_from", ["backbone", "union", "intersection"])
@pytest.mark.parametrize("classify_with", ["backbone", "projection"])
def test_every_way_to_label_and_to_weigh_is_the_same_in_parts(
    normalise: str, labels_from: str, classify_with: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"normalise": normalise, "labels_from": labels_from, "classify_with": classify_with}
    method = method_of(37, *(f"objective.{key}={value}" for key, value in keys.items()))
    whole = value_and_gradients(method)
    monkeypatch.setattr(products, "ENTRIES", 5 * BATCH)
    for one, other in zip(whole, value_and_gradients(method), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("parts")
def test_losses_that_look_at_all_rows_get_all_rows() -> None:
    for loss in ("wan", "ll_r", "two_way", "hml"):
        method = method_of(37, f"objective.loss={loss}", "objective.weight=1")
        _, term, _ = value_and_gradients(method)
        rows = method.dictionary.rows()
        cosines = unit(BATCH, WIDTH, 4) @ rows.projection.T
        matches = (unit(BATCH, 128, 3) @ rows.backbone.T).topk(3).indices
        labels = torch.zeros(BATCH, 37).scatter_(1, matches, 1.0)
        values = cosines if loss == "hml" else cosines / method.config.objective.temperature
        assert term.item() == pytest.approx(losses.build(loss)(values, labels).item(), rel=1e-5)


@given(batch=st.integers(1, 4), rows=st.integers(0, 30), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_log_sum_exp_in_parts_equals_the_plain_one(batch: int, rows: int, size: int, seed: int) -> None:
    query, memory = unit(batch, 4, seed).double(), unit(rows, 4, seed + 1).double()
    own = OwnRows(torch.arange(batch), torch.arange(rows) % 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "ENTRIES", size * batch)
        found = log_sum_exp(query, memory, 0.2, own)
    for i in range(batch):
        terms = [math.exp(float(query[i] @ memory[j]) / 0.2) for j in range(rows) if j % 5 != i]
        expected = math.log(sum(terms)) if terms else products.NOTHING
        assert found[i].item() == pytest.approx(expected, abs=2 if not terms else 1e-9)
    assert own.counts().tolist() == [sum(j % 5 == i for j in range(rows)) for i in range(batch)]


@pytest.mark.usefixtures("parts")
def test_a_part_in_which_all_rows_are_left_out_has_no_gradient_and_no_nan() -> None:
    query, rows = unit(BATCH, 4, 0).requires_grad_(), unit(20, 4, 1)
    own = OwnRows(torch.zeros(BATCH, dtype=torch.int64), torch.tensor([0] * 10 + [1] * 10))
    log_sum_exp(query, rows, 0.2, own).sum().backward()
    expected = torch.autograd.grad(log_sum_exp(query, rows[10:], 0.2).sum(), query)[0]
    torch.testing.assert_close(query.grad, expected)


@pytest.mark.usefixtures("parts")
def test_a_gradient_can_be_taken_twice() -> None:
    """The trainer measures how hard each part pulls before it goes back."""
    query = unit(BATCH, 4, 0).requires_grad_()
    total = torch.stack(over_parts(lambda cosines, _: cosines.exp().sum(1), query, unit(33, 4, 1))).sum()
    first, second = (torch.autograd.grad(total, query, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_does_not_reach_the_products() -> None:
    query, rows = unit(4, 32, 0), unit(50, 32, 1)
    expected = log_sum_exp(query, rows, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_sum_exp(query, rows, 0.2), expected)


@pytest.mark.parametrize("own_rows", ["keep", "exclude"])
def test_in_parts_a_step_needs_less_than_a_tenth_of_the_memory(own_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, batch = 8192, 64
    method = method_of(rows, f"dictionary.own_rows={own_rows}")
    monkeypatch.setattr(products, "ENTRIES", batch * 256)
    method.matcher.chunk = 256  # type: ignore[attr-defined]
    parts = peak_bytes(lambda: value_and_gradients(method, batch))
    assert parts < 10 * batch * 256 * 4 + (1 << 20)  # ten tensors of a part, and what does not grow with the rows
    monkeypatch.setattr(products, "ENTRIES", DENSE)
    method.matcher.chunk = rows  # type: ignore[attr-defined]
    assert parts < peak_bytes(lambda: value_and_gradients(method, batch)) / 10


class Waits(TorchDispatchMode):
    """Counts the operations for which a CPU would have to wait for a GPU's numbers."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in self.NAMES or boolean:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [[], ["dictionary.own_rows=exclude"], ["objective.labels_from=union", "objective.normalise=balanced"]],
    ids=["as it is", "own rows excluded", "union"],
)
@pytest.mark.usefixtures("parts")
def test_nothing_in_a_step_waits_for_the_device(overrides: list[str]) -> None:
    method = method_of(37, "objective.in_batch_negatives=true", *overrides)
    images = [torch.randn(BATCH, 3, 32, 32) for _ in range(2)]
    views = Views(images, [torch.zeros(BATCH, 4)] * 2, torch.arange(BATCH))
    with Waits() as waits:
        out = method(views)
        out.loss.backward()
        method.after_step([out])
    assert waits.found == []
    with Waits() as waits:
        bool(out.loss.isfinite())
    assert waits.found != []
