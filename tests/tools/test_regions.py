"""`mls regions`, as a user calls it."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mls
from mls.config import GridConfig, MLSOptions, ScenesConfig
from mls.core.neighbour_lists import NeighbourLists
from mls.core.regions import due
from mls.data.decode import decode
from mls.data.scenes import ScenesSource
from mls.data.sources import build_source, hash_of_images
from mls.frozen.features import hash_of_weights
from mls.frozen.match_picture import CELL, GAP, MARGIN, WHOLE, RegionPair, draw_pairs, draw_words
from mls.tools.regions import costs, examples_of_words

Call = Callable[..., subprocess.CompletedProcess[str]]


def test_lists_and_a_picture_of_a_run_s_own_images(tmp_path: Path, mls_command: Call, tiny: list[str]) -> None:
    few = [*tiny, "optim.epochs=1", "data.scenes.count=48", "monitor.knn_every_epochs=0"]
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*few, "model.backbone=resnet_tiny_fine"]), quiet=True)
    lists, picture = tmp_path / "lists.safetensors", tmp_path / "pairs.png"
    options = ["size=16", "neighbours=7", "--out", str(lists), "--picture", str(picture)]
    done = mls_command("regions", str(run.path), *options)
    assert done.returncode == 0, done.stderr
    found = NeighbourLists.open(lists)
    assert found.ids.shape == (48, 7)
    assert all(number not in row for number, row in enumerate(found.ids.tolist()))
    assert found.identity["weights"] == hash_of_weights(mls.load_backbone(run.path))
    assert found.identity["images"] == hash_of_images(build_source(run.config.data))
    assert (found.identity["size"], found.identity["grey"]) == (16, True)
    first, second, third = done.stdout.splitlines()
    assert first == f"{lists}: 7 neighbours of each of 48 images, by 9 regions"
    assert re.fullmatch(r"overlap of true labels: 0.\d{3} of the first 1, 0.\d{3} of the first 5; by chance .*", second)
    with Image.open(third) as drawn:
        assert drawn.size == (2 * MARGIN + 4 * (2 * WHOLE + 3 * GAP), 2 * MARGIN + 6 * (WHOLE + 18 + GAP))
    assert "also" not in found.identity
    done = mls_command("regions", str(run.path), "--also", "resnet_tiny", *options)
    assert done.returncode == 0, done.stderr
    of_two = NeighbourLists.open(lists)
    assert [other["name"] for other in of_two.identity["also"]] == ["resnet_tiny"]
    assert of_two.identity["weights"] == found.identity["weights"] and not torch.equal(of_two.ids, found.ids)
    done = mls_command("regions", str(run.path), "--words", str(tmp_path / "words.png"))
    assert done.returncode == 2 and f"{run.path} has no visual words of its own" in done.stderr
    done = mls_command("regions", "resnet_tiny", "sice=16", "--dataset", "scenes")
    assert done.returncode == 2
    assert (
        "unknown key 'objective.regions.sice' in the command line: did you mean 'objective.regions.size'?"
        in done.stderr
    )
    done = mls_command("regions", "resnet_tiny", "size=auto", "--dataset", "scenes")
    assert done.returncode == 2 and "objective.regions.size=auto is for a run" in done.stderr
    done = mls_command("regions", "resnet_tiny")
    assert done.returncode == 2
    assert (
        "resnet_tiny is no run folder, so it does not say where to look: name the images with --dataset" in done.stderr
    )


def test_an_unreadable_image_is_left_out_of_the_picture(tmp_path: Path, mls_command: Call) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:02}.png")
    (images / "00.png").write_bytes(b"no picture")
    options = ["size=16", "neighbours=3", "--out", str(tmp_path / "lists.safetensors"), "--picture"]
    done = mls_command("regions", "resnet_tiny", *options, str(tmp_path / "pairs.png"), "--dataset", str(images))
    assert done.returncode == 0 and done.stderr.count("skipped an image that cannot be read") == 1, done.stderr
    with Image.open(tmp_path / "pairs.png") as drawn:
        assert drawn.size[1] == 2 * MARGIN + 5 * (WHOLE + 18 + GAP)  # six images are asked for, the first is broken


def test_a_region_and_its_match_are_framed_in_one_colour_the_best_on_top() -> None:
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)
    left, right = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
    drawn = np.asarray(draw_pairs([[RegionPair(grey, grey, [(left, right), (left, left)], 1.25)]]))
    red, blue = ((drawn == colour).all(2) for colour in ((214, 39, 40), (42, 120, 214)))
    first = slice(MARGIN, MARGIN + WHOLE)
    second = slice(MARGIN + WHOLE + GAP // 2, MARGIN + 2 * WHOLE + GAP // 2)
    assert red[first, first].any() and not blue[first, first].any()
    assert red[first, second][WHOLE // 2 :].any() and blue[first, second][: WHOLE // 2].any()
    assert draw_pairs([]).size == (2 * MARGIN, 2 * MARGIN)


def test_a_word_is_shown_by_regions_that_are_it_the_most_frequent_first() -> None:
    source, grid = ScenesSource(ScenesConfig(count=4, test_count=16)), GridConfig(grid=2, side=0.5)
    clusters = torch.full((16,), 7)
    clusters[[2, 9]], clusters[4] = 1, 3  # word 1: the third region of image 0 and the second of image 2
    words = examples_of_words(source, grid, clusters)
    assert [name for name, _ in words] == ["word 7, 81.2%", "word 1, 12.5%", "word 3, 6.2%"]
    half = 16
    first, second = (decode(source.read(image)).permute(1, 2, 0).numpy() for image in (0, 2))
    shown = words[1][1]
    assert np.array_equal(shown[0], first[half:, :half]) and np.array_equal(shown[1], second[:half, half:])
    assert draw_words(words).height == 2 * MARGIN + 3 * (CELL * 2 // 3 + GAP) - GAP


def test_the_cost_of_a_recipe_counts_the_searches_that_its_run_makes() -> None:
    for changed in ("", "objective.regions.every_epochs=2", "objective.regions.every_epochs=0", "optim.epochs=5"):
        config = mls.load_config("mls_regions_scenes_tiny", [changed] * bool(changed))
        assert isinstance(config.objective, MLSOptions)
        warmup, every = config.objective.warmup_epochs, config.objective.regions.every_epochs
        searches = sum(due(step, 46, warmup, every) for step in range(1, 46 * config.optim.epochs + 1))
        found = {name.strip(): value for name, value in costs(config, config.objective, 6000)}
        assert found["times that all regions are gone through"].startswith(f"{searches}, ")
    assert found["a step, over one without windows"] == "1.50 times"  # two windows of half the side
    assert found["lists, on each GPU and in every checkpoint"] == "9 MB"
