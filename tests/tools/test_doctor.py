"""`mls doctor`: each finding on a plan that deserves it, with an override that helps; and what it measures."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from mls.config import Config, DataConfig
from mls.data.sources import build_source
from mls.engine import findings
from mls.engine.findings import GIB, Finding, Plan, Sizes, own_rows
from mls.recipes import load_config
from mls.slurm.profile import Profile
from mls.tools.doctor import doctor, measured

SCENES, CPU = "mls_scenes_tiny", torch.device("cpu")


def plan_of(*overrides: str, images: int = 6000, world: int = 1) -> Plan:
    return Plan(load_config(SCENES, list(overrides)), images, world)


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_the_recipes_have_nothing_to_tell() -> None:
    for recipe, images in ((SCENES, 6000), ("mls_coco_r50", 118_287), ("moco_v2_scenes_tiny", 6000)):
        found = findings.findings(Plan(load_config(recipe, []), images, 1))
        assert {finding.level for finding in found} == {"fine"}, found


@pytest.mark.parametrize(
    ("name", "level", "overrides", "images", "world"),
    [
        ("dictionary", "warning", ["dictionary.size=8192"], 6000, 1),
        ("filling", "warning", ["dictionary.size=16384", "optim.epochs=2", "optim.warmup_epochs=0"], 6000, 1),
        ("filling", "warning", ["optim.epochs=3", "objective.warmup_epochs=0"], 6000, 1),
        ("own-image positives", "warning", ["dictionary.size=16384"], 6000, 1),
        ("own-image positives", "fails", ["objective.k=5"], 320, 1),
        ("positives", "warning", ["objective.k=200"], 6000, 1),
        ("steps an epoch", "fails", [], 100, 1),
        ("steps an epoch", "warning", [], 200, 1),
        ("batch", "fails", [], 6000, 3),
        ("batch", "fails", [], 6000, 256),  # more processes than images in a batch
        ("batch normalisation", "warning", [], 6000, 32),
        ("batch normalisation", "fails", [], 6000, 128),
        ("key normalisation", "warning", ["model.key_norm=shuffle", "model.key_group=128"], 6000, 1),
        ("learning rate", "warning", ["optim.name=adamw"], 6000, 1),
        ("learning rate", "warning", ["optim.lr=1e-6", "optim.scale_lr=false"], 6000, 1),
        ("warm-up", "fails", ["optim.warmup_epochs=16"], 6000, 1),
        ("multi-label term", "fails", ["objective.warmup_epochs=16"], 6000, 1),
    ],
)
def test_a_hostile_setting_is_found_and_its_override_helps(
    name: str, level: str, overrides: list[str], images: int, world: int
) -> None:
    found = by_name(findings.findings(plan_of(*overrides, images=images, world=world)))
    assert found[name].level == level, found
    assert found[name].override
    again = by_name(findings.findings(plan_of(*overrides, found[name].override, images=images, world=world)))
    assert name not in again or again[name].level == "fine", again


def test_a_network_without_batch_normalisation_is_not_told_of_its_statistics() -> None:
    few = ["data.batch_size=4", "model.backbone=vit_tiny"]
    assert "batch normalisation" not in by_name(findings.findings(plan_of(*few)))
    assert "batch normalisation" in by_name(findings.findings(plan_of(*few, "objective.method=simsiam")))
    assert "batch normalisation" in by_name(findings.findings(plan_of("data.batch_size=4")))


def test_a_run_that_starts_says_what_is_amiss_in_a_line_each() -> None:
    plan = plan_of("dictionary.size=8192")
    lines = findings.at_start(plan, Sizes.planned(plan.config, 1))
    assert lines[0].startswith("dictionary: 8,192 rows, 6,000 images") and lines[0].endswith(
        "; try dictionary.size=2048"
    )
    assert not any("\n" in line for line in lines)
    assert findings.at_start(plan_of(), Sizes.planned(plan_of().config, 1)) == []


def test_more_processes_than_images_need_fewer_processes() -> None:
    (found,) = findings.findings(plan_of(images=600, world=256))
    assert (found.level, found.override) == ("fails", "") and found.measured.endswith("start fewer processes")


def test_methods_without_a_dictionary_are_asked_nothing_about_one() -> None:
    names = by_name(findings.findings(plan_of("objective.method=simsiam"))).keys()
    assert "learning rate" in names and not names & {"dictionary", "filling", "positives", "multi-label term"}


@pytest.mark.parametrize("rows", [250, 900, 1500, 2600])
def test_own_rows_are_those_of_a_simulated_ring(rows: int) -> None:
    images, draw = 1000, np.random.default_rng(0)
    stream = np.concatenate([draw.permutation(images) for _ in range(6)])
    counts = [(stream[place - rows : place] == stream[place]).sum() for place in range(5 * images, 6 * images)]
    assert own_rows(rows, images) == pytest.approx(np.mean(counts), abs=0.05)


@pytest.mark.parametrize(
    ("have", "level", "override"), [(1.0, "fails", "dictionary.storage=bf16"), (1000.0, "fine", "")]
)
def test_the_state_is_held_against_the_memory(
    have: float, level: str, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "available_memory", lambda: have * GIB)
    plan = plan_of("dictionary.size=4194304")
    sizes = Sizes.planned(plan.config, world=1)
    assert sizes.dictionary == pytest.approx(4194304 * 4 * (128 + 64), rel=0.2)
    found = findings.memory(plan, sizes, CPU)
    assert (found.level, found.override) == (level, override)
    shared = replace(plan, world=8, config=load_config(SCENES, ["dictionary.size=4194304", "dictionary.sharded=true"]))
    assert Sizes.planned(shared.config, world=8).dictionary == sizes.dictionary // 8


def test_images_are_counted_with_their_windows_and_halved_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = ["objective.windows.count=2", "objective.windows.size=32"]
    assert plan_of().config.augment.size == 32
    plain, more = (findings.kept_of_image(plan_of(*overrides).config, half=False) for overrides in ([], windows))
    assert more == pytest.approx(3 * plain, rel=0.01)  # the statistics of normalisation are kept once
    monkeypatch.setattr(findings, "available_memory", lambda: 2**20)
    for batch, override in ((512, "engine.accumulate=2"), (511, "")):
        plan = plan_of(f"data.batch_size={batch}", "dictionary.size=512")
        assert findings.memory(plan, Sizes.planned(plan.config, world=1), CPU).override == override


def test_blocks_that_are_computed_once_more_keep_one_pass_at_a_time() -> None:
    keys = ["engine.checkpointing=true", "augment.small_size=32"]
    two, four = (
        findings.kept_of_image(plan_of(*keys, f"augment.small_crops={count}").config, half=False) for count in (1, 3)
    )
    assert 1.2 * two < four < 1.8 * two  # what blocks take in is kept of all passes


def test_planned_sizes_are_those_of_the_network_and_its_checkpoint(tmp_path: Path) -> None:
    from mls.core import methods
    from mls.engine import optim

    config = load_config(SCENES, [])
    method = methods.build(config)
    sizes = Sizes.planned(config, world=1)
    assert sizes == Sizes.of(method, config)
    supervised = Sizes.planned(load_config(SCENES, ["objective.method=supervised"]), 1, torch.zeros(8, 10))
    assert supervised.labels == 8 * 10 * 4
    optimizer = optim.build(config, method)
    sum(parameter.sum() for parameter in method.parameters() if parameter.requires_grad).backward()  # type: ignore
    optimizer.step()
    torch.save({"method": method.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    assert sizes.checkpoint(config, 1) == pytest.approx((tmp_path / "state.pt").stat().st_size, rel=0.1)


@pytest.mark.parametrize(
    ("free", "overrides", "level", "override"),
    [
        (1e6, [], "fails", "engine.keep_last=1"),
        (1e6, ["engine.milestone_epochs=1"], "fails", "engine.milestone_epochs=0"),
        (1e12, [], "fine", ""),
    ],
)
def test_checkpoints_are_held_against_the_disk(
    free: float, overrides: list[str], level: str, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    plan = plan_of(*overrides)
    found = findings.disk(plan, Sizes.planned(plan.config, 1))
    assert (found.level, found.override) == (level, override)


def test_saving_is_held_against_the_time_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(f"run.root={tmp_path}", "engine.checkpoint_every=10")
    sizes = Sizes.planned(plan.config, 1)
    monkeypatch.setattr(measured, "WRITTEN", 1 << 20)
    assert by_name(list(measured.saving(plan, sizes, 0.1, None)))["saving"].level == "fine"
    monkeypatch.setattr(measured, "_written", lambda folder, size: 100.0)
    for job, level in ((None, "warning"), (Profile(), "fails"), (Profile(signal_seconds=100_000), "fine")):
        found = by_name(list(measured.saving(plan, sizes, 0.1, job)))
        assert found["saving"].level == level, found
        assert found["time between checkpoints"].override.startswith("engine.checkpoint_every=")
    monkeypatch.setattr(measured, "_written", lambda folder, size: os.listdir(folder / "no such"))
    assert next(measured.saving(plan, sizes, None, None)).level == "fails"


# ----------------------------------------------------------------------------------------------------------- measured


@pytest.fixture
def photographs(tmp_path: Path) -> Callable[..., Config]:
    """A folder of images of noise, the first `same` of them alike, the last `broken` of them no images."""

    def make(count: int = 30, same: int = 0, broken: int = 0, side: int = 40) -> Config:
        draw = np.random.default_rng(0)
        coarse = [draw.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(count)]
        for place in range(count):
            picture = Image.fromarray(coarse[0 if place < same else place]).resize((side, side))
            picture.save(tmp_path / f"{place:03d}.png")
            if place >= count - broken:
                (tmp_path / f"{place:03d}.png").write_bytes(b"no image")
        return load_config(SCENES, [f"data.root={tmp_path}", "data.source=folder", f"run.root={tmp_path}"])

    return make


@pytest.mark.parametrize(
    ("how", "name", "level", "override"),
    [
        ({}, "decoding", "fine", ""),
        ({"broken": 3}, "decoding", "fails", "data.max_unreadable=0.2"),
        ({"side": 12}, "size of images", "warning", "augment.size=12"),
        ({}, "near-duplicates", "fine", ""),
        ({"same": 9}, "near-duplicates", "warning", ""),
    ],
)
def test_images_are_decoded_and_compared(
    how: dict[str, int], name: str, level: str, override: str, photographs: Callable[..., Config]
) -> None:
    config = photographs(**how)
    found = by_name(list(measured.images(build_source(config.data), config)))[name]
    assert (found.level, found.override) == (level, override), found


@pytest.mark.parametrize(("loaded", "level"), [(50.0, "warning"), (90.0, "fine")])
def test_a_loader_that_is_slower_than_the_steps_is_told(loaded: float, level: str) -> None:
    source = build_source(DataConfig(source="scenes", limit=64))
    found = measured._waiting(measured.Speed(loaded, 100.0, 8, 0.1), source, plan_of("data.workers=0"))
    assert found.level == level and found.override.startswith("data.workers=") == (level == "warning")


def test_a_step_that_does_not_fit_into_a_gpu_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*some: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measured._Steps, "timed", full)
    monkeypatch.setattr(measured, "LOADER_SECONDS", 0.01)
    plan = plan_of("data.workers=0", "data.scenes.count=256")
    found, (finding,) = measured.speed(plan, build_source(plan.config.data), CPU)
    assert found is None and (finding.level, finding.override) == ("fails", "engine.accumulate=2")


def test_everything_is_told_as_json(
    photographs: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photographs()
    monkeypatch.setattr(measured, "LOADER_SECONDS", 0.01)
    monkeypatch.setattr(measured, "WRITTEN", 1 << 20)
    words = [f"data.root={tmp_path}", "data.source=folder", "data.batch_size=8", "dictionary.size=64", "data.workers=0"]
    with pytest.raises(typer.Exit) as end:
        doctor([SCENES, *words, "objective.k=1", f"run.root={tmp_path}"], json=True)
    assert end.value.exit_code == 2  # D/N: all positives may be the query's own image
    told = json.loads(capsys.readouterr().out)
    names = [finding["name"] for finding in told["findings"]]
    assert {"images", "decoding", "own-image positives", "memory", "disk", "saving", "frameworks"} <= {*names}
    assert "loader against step" not in names  # no step is timed of what will fail
    again = told["again"].split()[3:]
    assert "dictionary.own_rows=exclude" in again and f"data.root={tmp_path}" in again
    doctor([SCENES, *again], json=True)
    assert "loader against step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["objective.k=3000"], "objective.k 3000 is larger than dictionary.size 2048"),
        (["data.root=/no/such", "data.source=folder"], "data.root /no/such does not exist"),
        (["dictionary.siz=4"], "dictionary.siz"),
    ],
)
def test_what_cannot_even_start_is_a_finding(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end:
        doctor([SCENES, *words])
    out = capsys.readouterr().out
    assert end.value.exit_code == 2 and "FAILS" in out and sentence in " ".join(out.split())
