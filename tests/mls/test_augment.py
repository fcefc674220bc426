from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from mls.config import AugmentConfig
from mls.data import Batch, augment_compiled
from mls.data.augment import OPERATIONS, Augment, Parameters, apply, blur_radius, draw, hashed_bell, normalise
from mls.data.augment_compiled import CompiledAugment
from mls.data.augment_uint8 import augment_in_place

CONFIG = AugmentConfig(size=32, small_crops=1, small_size=21, noise=0.1)
PHOTO = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
TOLERANCE = 2e-6  # rounding of float32 in [0, 1]


def crops(count: int, size: int) -> Tensor:
    """Different places of a photograph, uint8."""
    places = np.random.default_rng(0).integers(0, 427 - size, (count, 2))
    return torch.stack([PHOTO[:, y : y + size, x : x + size] for y, x in places])


def batch(ids: list[int], epoch: int = 1) -> Batch:
    views = [crops(64, 32), crops(64, 32), crops(64, 21)]
    boxes = [torch.rand(64, 4, generator=torch.Generator().manual_seed(view)) for view in range(3)]
    return Batch([view[ids] for view in views], [view[ids] for view in boxes], torch.tensor(ids), epoch)


def nothing(count: int) -> Parameters:
    """Parameters that leave every sample as it is."""
    off = replace(CONFIG, jitter=0, grey=0, blur=0, flip=0, noise=0)
    return draw(off, 0, 1, np.arange(count), 0)


def random_parameters(count: int, **changes: Tensor) -> Parameters:
    return replace(draw(CONFIG, 0, 1, np.arange(count), 0), **changes)


def adjusted(image: Tensor, parameters: Parameters, row: int, operation: str) -> Tensor:
    return getattr(reference, f"adjust_{operation}")(image, getattr(parameters, operation)[row].item())


def by_torchvision(images: Tensor, parameters: Parameters, config: AugmentConfig) -> Tensor:
    """MoCo-v2's augmentation, one sample after the other."""
    size = 2 * blur_radius(config, *images.shape[2:]) + 1
    done = []
    for row, image in enumerate(images):
        if parameters.jitter[row]:
            for number in parameters.order[row].tolist():
                image = adjusted(image, parameters, row, OPERATIONS[number])
        if parameters.grey[row]:
            image = reference.rgb_to_grayscale(image, num_output_channels=3)
        if parameters.blur[row]:
            image = reference.gaussian_blur(image, [size, size], [parameters.sigma[row].item()])
        if parameters.flip[row]:
            image = reference.horizontal_flip(image)
        done.append(image)
    return torch.stack(done)


@pytest.mark.parametrize("size", [32, 21, 5])
def test_a_random_composition_equals_torchvisions(size: int) -> None:
    images = crops(64, size) / 255
    parameters = random_parameters(64, noise=torch.zeros(64))
    assert len(parameters.order.unique(dim=0)) > 15, "most of the 24 orders should occur"
    ours, theirs = apply(images, parameters, CONFIG), by_torchvision(images, parameters, CONFIG)
    assert (ours - theirs).abs().max() < 20 * TOLERANCE  # the operations multiply each other's rounding


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_colour_operation_equals_torchvisions(operation: str) -> None:
    images = crops(16, 32) / 255
    same = {name: torch.ones(16) for name in OPERATIONS[:3]} | {"hue": torch.zeros(16)}
    strong = torch.linspace(-0.5, 0.5, 16) if operation == "hue" else torch.linspace(0, 2, 16)
    parameters = replace(nothing(16), jitter=torch.ones(16, dtype=torch.bool), **same | {operation: strong})
    theirs = torch.stack([adjusted(images[i], parameters, i, operation) for i in range(16)])
    assert (theirs - images).abs().max() > 0.1
    assert (apply(images, parameters, CONFIG) - theirs).abs().max() < TOLERANCE


def test_grey_equals_torchvisions() -> None:
    images = crops(16, 32) / 255
    parameters = replace(nothing(16), grey=torch.arange(16) % 2 == 0)
    theirs = by_torchvision(images, parameters, CONFIG)
    assert torch.equal(apply(images, parameters, CONFIG), theirs)


@pytest.mark.parametrize("size", [64, 32, 6, 2])
def test_blur_equals_torchvisions_with_the_same_kernel(size: int) -> None:
    images = crops(16, size) / 255
    sigma = torch.linspace(0.1, 2.0, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    parameters = replace(nothing(16), blur=torch.ones(16, dtype=torch.bool), sigma=sigma)
    theirs = by_torchvision(images, parameters, CONFIG)
    assert blur_radius(CONFIG, size, size) == min(6, size - 1)
    assert (theirs - images).abs().max() > 0.01
    assert (apply(images, parameters, CONFIG) - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("operation", ["jitter", "grey", "blur", "flip", "noise"])
def test_an_operation_leaves_the_others_samples_exactly_as_they_are(operation: str) -> None:
    images = crops(8, 32) / 255
    some = torch.tensor([True, False, True, False, False, False, False, True])
    value = torch.where(some, 0.1, 0.0) if operation == "noise" else some
    parameters = replace(nothing(8), sigma=torch.ones(8), **{operation: value})
    before = images.clone()
    after = apply(images, parameters, CONFIG)
    assert torch.equal(images, before), "apply must not change its input"
    assert [torch.equal(a, b) for a, b in zip(after, images, strict=True)] == (~some).tolist()
    assert torch.equal(apply(images, nothing(8), CONFIG), images)


@pytest.mark.parametrize("size", [32, 21])
@pytest.mark.parametrize("channels_last", [True, False])
def test_views_are_torchvisions_normalised(size: int, channels_last: bool) -> None:
    config = replace(CONFIG, size=size, noise=0)
    images = crops(64, size)
    ids = torch.arange(64)
    views = Augment(config, 5, "cpu", channels_last)(Batch([images], [torch.rand(64, 4)], ids, epoch=2))
    theirs = by_torchvision(images / 255, draw(config, 5, 2, ids.numpy(), 0), config)
    assert (views.images[0] - reference.normalize(theirs, config.mean, config.std)).abs().max() < 100 * TOLERANCE
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert views.images[0].is_contiguous(memory_format=layout)
    plain = reference.normalize(images / 255, config.mean, config.std)
    assert (normalise(images, config, "cpu") - plain).abs().max() < TOLERANCE


LEVELS = {"jitter": (0.5, 5), "grey": (0.2, 1), "blur": (0.3, 2), "flip": (0, 0), "all": (0.5, 5)}  # mean and largest


@pytest.mark.parametrize("operation", LEVELS)
def test_a_worker_augments_as_the_device_does_to_a_few_levels_of_255(operation: str) -> None:
    images, config = crops(64, 96), replace(CONFIG, noise=0)
    parameters = random_parameters(64, noise=torch.zeros(64))
    if operation != "all":
        parameters = replace(nothing(64), **{operation: torch.ones(64, dtype=torch.bool)})
        parameters = replace(parameters, order=random_parameters(64).order)
    ours = images.clone(memory_format=torch.channels_last)
    augment_in_place(ours, parameters, config)
    difference = ours - 255 * apply(images / 255, parameters, config)
    mean, largest = LEVELS[operation]
    assert difference.abs().mean() <= mean and difference.abs().max() <= largest + 1e-3
    assert difference.mean().abs() < 0.05, "no operation may shift the brightness"


def test_hue_turned_in_a_worker_equals_the_devices_at_any_angle() -> None:
    images = crops(16, 32)
    parameters = replace(nothing(16), jitter=torch.ones(16, dtype=torch.bool), hue=torch.linspace(-0.5, 0.5, 16))
    parameters = replace(parameters, **{name: torch.ones(16) for name in OPERATIONS[:3]})
    ours = images.clone(memory_format=torch.channels_last)
    augment_in_place(ours, parameters, CONFIG)
    assert (ours - 255 * apply(images / 255, parameters, CONFIG)).abs().max() < 0.6


def test_a_batch_that_a_worker_augmented_is_finished_on_the_device() -> None:
    done = batch(list(range(64)))
    for view, images in enumerate(done.crops):
        done.crops[view] = images.clone(memory_format=torch.channels_last)
        augment_in_place(done.crops[view], draw(CONFIG, 5, 1, done.ids.numpy(), view), CONFIG)
    here = Augment(CONFIG, 5, "cpu", positions=True)(batch(list(range(64))))
    there = Augment(CONFIG, 5, "cpu", positions=True)(replace(done, augmented=True))
    for ours, theirs, flips, same in zip(there.images, here.images, there.flips, here.flips, strict=True):
        assert (ours - theirs).abs().mean() < 0.5 / 255 / min(CONFIG.std) and torch.equal(flips, same)
    plain = replace(CONFIG, noise=0.0)
    whole = Augment(plain, 5, "cpu")(replace(done, augmented=True))
    half = Augment(plain, 5, "cpu", channels_last=False, dtype=torch.bfloat16)(replace(done, augmented=True))
    for ours, rounded, uint8 in zip(whole.images, half.images, done.crops, strict=True):
        assert (ours - normalise(uint8, plain, "cpu")).abs().max() < TOLERANCE
        assert torch.equal(rounded, ours.to(torch.bfloat16)) and rounded.is_contiguous()


def test_views_may_be_written_over_those_of_the_last_batch() -> None:
    augment, ids = Augment(CONFIG, 0, "cpu", reuse=True), list(range(64))
    first = augment(batch(ids)).images[0]
    expected = first.clone()
    second = augment(batch(ids, epoch=2)).images[0]
    assert not torch.equal(second, expected) and first.data_ptr() == second.data_ptr()
    assert torch.equal(augment(batch(ids)).images[0], expected)


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(64)), st.integers(1, 63), st.integers(0, 2**40), st.integers(1, 1000))
def test_a_view_depends_on_seed_epoch_id_and_view_alone(order: list[int], split: int, seed: int, epoch: int) -> None:
    augment = Augment(CONFIG, seed, "cpu")
    whole = augment(batch(list(range(64)), epoch))
    for ids in (order[:split], order[split:]):
        part = augment(batch(ids, epoch))
        assert part.ids.tolist() == ids
        for view in range(3):
            assert torch.equal(part.images[view], whole.images[view][ids])
            assert torch.equal(part.boxes[view], whole.boxes[view][ids])


def test_large_views_do_not_depend_on_how_the_batch_is_split() -> None:
    augment = Augment(replace(CONFIG, size=225), 0, "cpu")
    images, ids = crops(7, 225), torch.arange(7)
    whole = augment(Batch([images], [torch.zeros(7, 4)], ids, 1)).images[0]
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7)):
        part = augment(Batch([images[rows]], [torch.zeros(len(ids[rows]), 4)], ids[rows], 1))
        assert torch.equal(part.images[0], whole[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_in_half_precision_are_the_rounded_ones(dtype: torch.dtype) -> None:
    whole = Augment(CONFIG, 0, "cpu")(batch(list(range(64))))
    half = Augment(CONFIG, 0, "cpu", dtype=dtype)(batch(list(range(64))))
    for precise, rounded in zip(whole.images, half.images, strict=True):
        assert torch.equal(rounded, precise.to(dtype))
        assert rounded.is_contiguous(memory_format=torch.channels_last)


def test_parameters_have_mocos_distribution() -> None:
    parameters = draw(CONFIG, 0, 1, np.arange(20_000), 0)
    for name, probability in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.5), ("flip", 0.5)):
        assert abs(getattr(parameters, name).float().mean() - probability) < 0.015
    ranges = {"brightness": (0.6, 0.8), "contrast": (0.6, 0.8), "saturation": (0.6, 0.8), "hue": (-0.1, 0.2)}
    ranges |= {"sigma": (0.1, 1.9), "noise": (0, 0.1)}
    for name, (start, width) in ranges.items():
        assert kstest(getattr(parameters, name).numpy(), "uniform", (start, width)).pvalue > 0.001, name
    orders, counts = parameters.order.unique(dim=0, return_counts=True)
    assert orders.sort(dim=1).values.unique(dim=0).tolist() == [[0, 1, 2, 3]]
    assert len(orders) == 24 and abs(counts / 20_000 - 1 / 24).max() < 0.006


def test_parameters_of_views_epochs_and_seeds_are_independent() -> None:
    ids = np.arange(5000)
    draws = [draw(CONFIG, 0, 1, ids, 0), draw(CONFIG, 0, 1, ids, 1), draw(CONFIG, 0, 2, ids, 0)]
    draws.append(draw(CONFIG, 1, 1, ids, 0))
    names = ("jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "flip", "noise")
    columns = np.stack([getattr(one, name).float().numpy() for one in draws for name in names])
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.06


def test_probabilities_zero_and_one_mean_never_and_always() -> None:
    for probability in (0.0, 1.0):
        shares = {name: probability for name in ("jitter", "grey", "blur", "flip")}
        parameters = draw(replace(CONFIG, **shares), 0, 1, np.arange(1000), 0)
        assert all((getattr(parameters, name) == bool(probability)).all() for name in shares)


def test_strengths_above_one_do_not_invert() -> None:
    assert draw(replace(CONFIG, brightness=1.5), 0, 1, np.arange(1000), 0).brightness.min() >= 0


def test_hashed_noise_is_near_to_normal_and_white() -> None:
    noise = hashed_bell(torch.tensor([1, 2, 2**52]), 60_000).double()
    assert noise.mean(dim=1).abs().max() < 0.02
    assert (noise.std(dim=1) - 1).abs().max() < 0.02
    within = (noise.abs() < 1).double().mean().item(), (noise.abs() < 2).double().mean().item()
    assert within == pytest.approx((0.6827, 0.9545), abs=0.01)
    lags = torch.stack([*noise[:, :-1], *noise[:, 1:]])
    assert (torch.corrcoef(lags) - torch.eye(6)).abs().max() < 0.02


def test_noise_has_its_deviation_and_its_key() -> None:
    images = torch.full((3, 3, 64, 64), 0.5)
    parameters = replace(nothing(3), noise=torch.tensor([0.05, 0.1, 0.0]), noise_key=torch.tensor([7, 8, 9]))
    noise = apply(images, parameters, CONFIG) - images
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([0.05, 0.1, 0.0], rel=0.02)
    assert torch.equal(noise, apply(images, parameters, CONFIG) - images)
    keys = {int(draw(CONFIG, 0, epoch, np.array([3]), view).noise_key) for epoch in (1, 2) for view in (0, 1)}
    assert len(keys) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_views_of_the_cpu() -> None:
    images, ids = crops(64, 32), torch.arange(64)
    work = Batch([images, images], [torch.zeros(64, 4)] * 2, ids, 1)
    for here, there in zip(
        Augment(CONFIG, 0, "cpu")(work).images, Augment(CONFIG, 0, "cuda")(work).images, strict=True
    ):
        assert (here - there.cpu()).abs().max() < 1e-4
    keys = torch.arange(5)
    assert torch.equal(hashed_bell(keys, 999), hashed_bell(keys.cuda(), 999).cpu())


# ------------------------------------------------------------------------------------------------ as one program


def as_one_program(config: AugmentConfig, of: Batch) -> list[tuple[Tensor, Tensor]]:
    """What both make of a batch, in the type and layout of a run."""
    parts = (config, 0, "cpu", True, torch.float32)
    pairs = list(zip(Augment(*parts)(of).images, CompiledAugment(*parts)(of).images, strict=True))
    assert all(view.is_contiguous(memory_format=torch.channels_last) for pair in pairs for view in pair)
    return pairs


NORMALISED = TOLERANCE / min(CONFIG.std)  # rounding, after the division


@pytest.mark.parametrize("changes", [{}, {"noise": 0.0, "blur": 0.0}, {"jitter": 1.0, "grey": 0.0, "flip": 1.0}])
def test_one_program_without_choices_gives_what_the_operations_give(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        augment_compiled, "program", lambda: augment_compiled.augmented
    )  # without waiting for the compiler
    for eager, program in as_one_program(replace(CONFIG, **changes), batch(list(range(64)))):
        torch.testing.assert_close(program, eager, rtol=0, atol=NORMALISED)
