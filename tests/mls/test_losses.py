"""The losses against plain loops in double precision, their gradients, and what they do at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mls.core import losses
from mls.core.losses import info_nce
from mls.errors import ConfigError

MINE = ["an", "bce_pos", "softmax"]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def plain_an(logits: list[list[float]], labels: list[list[int]]) -> float:
    terms = [
        log_sigmoid(x if y > 0 else -x)
        for row, of in zip(logits, labels, strict=True)
        for x, y in zip(row, of, strict=True)
    ]
    return -sum(terms) / len(terms)


def plain_bce_pos(logits: list[list[float]], labels: list[list[int]]) -> float:
    terms = [
        log_sigmoid(x) if y > 0 else 0.0
        for row, of in zip(logits, labels, strict=True)
        for x, y in zip(row, of, strict=True)
    ]
    return -sum(terms) / len(terms)


def plain_softmax(logits: list[list[float]], labels: list[list[int]]) -> float:
    samples = []
    for row, of in zip(logits, labels, strict=True):
        top = max(row)
        log_sum = top + math.log(sum(math.exp(x - top) for x in row))
        positives = [x for x, y in zip(row, of, strict=True) if y > 0]
        if positives:
            samples.append(sum(log_sum - x for x in positives) / len(positives))
    return sum(samples) / len(samples) if samples else 0.0


PLAIN = {"an": plain_an, "bce_pos": plain_bce_pos, "softmax": plain_softmax}


def random_batch(seed: int, batch: int = 5, classes: int = 7, spread: float = 5.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * spread
    return logits, torch.randint(-1, 2, (batch, classes), generator=generator)


@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("name", MINE)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 6),
    classes=st.integers(1, 9),
    temperature=st.sampled_from([1.0, 0.2, 4.0]),
)
def test_loss_equals_a_plain_loop(name: str, seed: int, batch: int, classes: int, temperature: float) -> None:
    logits, labels = random_batch(seed, batch, classes)
    expected = PLAIN[name]((logits / temperature).tolist(), labels.tolist())
    loss = losses.build(name, temperature=temperature)
    assert loss(logits, labels).item() == pytest.approx(expected, abs=1e-10, rel=1e-10)
    assert loss(logits.float(), labels.float()).item() == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", MINE)
def test_gradient_equals_finite_differences(name: str) -> None:
    logits, labels = random_batch(3, batch=3, classes=4, spread=2.0)
    labels[1] = 0
    assert torch.autograd.gradcheck(lambda x: losses.build(name, temperature=0.5)(x, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", MINE)
def test_zero_and_minus_one_are_the_same_to_these_losses(name: str) -> None:
    logits, labels = random_batch(4)
    loss = losses.build(name)
    assert loss(logits, labels).item() == loss(logits, labels.clamp(min=0)).item()


@pytest.mark.parametrize("name", MINE)
def test_bf16_logits_are_computed_in_fp32(name: str) -> None:
    logits, labels = random_batch(5, batch=16, classes=200)
    half = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.build(name)(half, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(PLAIN[name](half.double().tolist(), labels.tolist()), rel=1e-5)


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_right_at_logits_of_eighty(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[80.0, -80.0, 80.0, -80.0], [-80.0, 80.0, -80.0, -80.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 1, 0, -1], [1, 0, 1, 0]])
    value = losses.build(name)(logits, labels)
    value.backward()
    assert value.item() == pytest.approx(PLAIN[name](logits.tolist(), labels.tolist()), rel=1e-6)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] < 0  # a confident mistake is still pulled back


@pytest.mark.parametrize("name", MINE)
def test_samples_without_positives_give_finite_values_and_gradients(name: str) -> None:
    logits, labels = random_batch(6)
    labels[2] = 0
    logits.requires_grad_()
    value = losses.build(name)(logits, labels)
    value.backward()
    assert value.item() == pytest.approx(PLAIN[name](logits.tolist(), labels.tolist()), rel=1e-10)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["bce_pos", "softmax"])
def test_a_batch_without_any_positive_has_no_loss_and_no_gradient(name: str) -> None:
    logits, labels = random_batch(7)
    logits.requires_grad_()
    value = losses.build(name)(logits, labels.clamp(max=0))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_softmax_takes_the_mean_over_the_samples_that_have_positives() -> None:
    logits, labels = random_batch(8, batch=2)
    labels[0, 0], labels[1] = 1, 0
    loss = losses.build("softmax")
    assert loss(logits, labels).item() == pytest.approx(loss(logits[:1], labels[:1]).item(), rel=1e-12)


@pytest.mark.parametrize("name", MINE)
def test_reductions_agree_and_none_gives_the_entries(name: str) -> None:
    logits, labels = random_batch(9)
    labels[:, 0] = 1
    parts = losses.build(name, reduction="none")(logits, labels)
    assert parts.shape == (logits.shape if losses.build(name).elementwise else logits.shape[:1])
    assert losses.build(name, reduction="sum")(logits, labels).item() == pytest.approx(parts.sum().item())
    assert losses.build(name, reduction="mean")(logits, labels).item() == pytest.approx(parts.mean().item())


def test_bce_is_an_by_another_name() -> None:
    assert type(losses.build("bce")) is type(losses.build("an"))
    assert "bce" not in losses.names()


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_says_what_it_takes(name: str) -> None:
    loss = losses.build(name)
    assert loss.takes in ("logits", "cosines")
    assert isinstance(loss.elementwise, bool)


def test_unknown_names_and_options_name_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match="unknown loss 'bcee': did you mean 'bce'"):
        losses.build("bcee")
    with pytest.raises(ConfigError, match="unknown option of loss an 'temprature': did you mean 'temperature'"):
        losses.build("bce", temprature=0.2)
    with pytest.raises(ConfigError, match="unknown reduction 'man': did you mean 'mean'"):
        losses.build("an", reduction="man")


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="give a number above 0"):
        losses.build("softmax", temperature=temperature)


@pytest.mark.parametrize("options", [{"temperature": "warm"}, {"temperature": True}, {"reduction": 3}])
def test_options_of_the_wrong_type_are_refused_with_an_example(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be .+: give a value such as (1\.0|'mean')"):
        losses.build("an", **options)


def test_whole_numbers_serve_where_yaml_leaves_out_the_point() -> None:
    assert losses.build("an", temperature=2).temperature == 2.0


def test_two_losses_cannot_share_a_name() -> None:
    with pytest.raises(ConfigError, match="there is a loss called 'bce' already"):
        losses.register("bce")(losses.Loss)


# ---------------------------------------------------------------------------------------------------- InfoNCE


def unit_vectors(seed: int, *counts: int, dim: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(counts), dim, generator=generator, dtype=torch.float64)
    return list(torch.nn.functional.normalize(vectors, dim=1).split(counts))


def plain_info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float, mask: Tensor | None) -> float:
    total = 0.0
    for i, q in enumerate(query.tolist()):
        dot = lambda other, q=q: sum(a * b for a, b in zip(q, other, strict=True)) / temperature
        own = dot(key[i].tolist())
        logits = [own] + [dot(n) for j, n in enumerate(negatives.tolist()) if mask is None or not mask[i, j]]
        top = max(logits)
        total += top + math.log(sum(math.exp(x - top) for x in logits)) - own
    return total / len(query)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 5),
    count=st.integers(0, 8),
    temperature=st.sampled_from([1.0, 0.2, 0.01]),
    masked=st.booleans(),
)
def test_info_nce_equals_a_plain_loop(seed: int, batch: int, count: int, temperature: float, masked: bool) -> None:
    query, key, negatives = unit_vectors(seed, batch, batch, count)
    mask = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    expected = plain_info_nce(query, key, negatives, temperature, mask)
    assert info_nce(query, key, negatives, temperature, mask).item() == pytest.approx(expected, abs=1e-10, rel=1e-10)
    single = info_nce(query.float(), key.float(), negatives.float(), temperature, mask)
    assert single.item() == pytest.approx(expected, abs=1e-5, rel=1e-4 if temperature == 0.01 else 1e-5)


def test_info_nce_gradient_equals_finite_differences_and_reaches_the_query() -> None:
    query, key, negatives = unit_vectors(1, 3, 3, 5)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, :3] = True
    assert torch.autograd.gradcheck(lambda q: info_nce(q, key, negatives, 0.2, mask), query.requires_grad_())


def test_info_nce_without_negatives_is_zero() -> None:
    query, key, negatives = unit_vectors(2, 4, 4, 0)
    query.requires_grad_()
    value = info_nce(query, key, negatives, 0.2)
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_info_nce_with_all_negatives_left_out_is_zero_and_finite() -> None:
    query, key, negatives = unit_vectors(3, 2, 2, 4)
    query.requires_grad_()
    value = info_nce(query, key, negatives, 0.2, torch.ones(2, 4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert torch.isfinite(query.grad).all()


def test_info_nce_of_bf16_vectors_under_autocast_is_computed_in_fp32() -> None:
    query, key, negatives = (v.bfloat16() for v in unit_vectors(4, 8, 8, 50, dim=32))
    with torch.autocast("cpu", torch.bfloat16):
        value = info_nce(query, key, negatives, 0.2)
        exact = info_nce(query.float(), key.float(), negatives.float(), 0.2)
    expected = plain_info_nce(query.double(), key.double(), negatives.double(), 0.2, None)
    assert value.dtype == torch.float32
    assert value.item() == exact.item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_is_finite_at_logits_of_eighty() -> None:
    query, negatives = unit_vectors(5, 4, 6)
    single = query.float().requires_grad_()
    value = info_nce(single, -single.detach(), negatives.float(), 1 / 80)  # its own key is the farthest point
    value.backward()
    assert value.item() == pytest.approx(plain_info_nce(query, -query, negatives, 1 / 80, None), rel=1e-5)
    assert torch.isfinite(single.grad).all()
