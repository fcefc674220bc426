"""Tables that compare backbones: which rows there are, what they are compared with, what is left out and said."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mls.config import AugmentConfig
from mls.errors import CheckpointError
from mls.eval import cells, load_suite
from mls.eval import suite as suite_module
from mls.eval.cells import evaluation
from mls.eval.comparison import as_text, difference
from mls.eval.suite import Part, chosen_rows, paper_row_of
from mls.models import load_backbone, save_backbone
from mls.results import Results
from mls.tools.bench.faults.commands import Command

FEW = ["data.scenes.count=120", "data.scenes.test_count=40"]
SUITE = """
title: Backbones
compares: backbones
source: a paper
columns:
  - {name: linear, protocol: linear_scenes}
  - {name: kNN, protocol: knn_scenes}
rows:
  - {name: random, weights: "random:resnet_tiny", method: random}
  - {name: published, weights: "torchvision:resnet18@IMAGENET1K_V1", method: supervised, paper: [80.0, null]}
  - {name: MLS, method: mls, ours: false, paper: [50.0, 40.0]}
"""


@pytest.fixture
def suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "backbones.yaml"
    path.write_text(SUITE)
    return path


def saved(folder: Path, method: str) -> str:
    folder.mkdir()
    save_backbone(
        folder, load_backbone("resnet_tiny"), {"architecture": "resnet_tiny", "method": method}, AugmentConfig(size=32)
    )
    return str(folder)


def test_a_run_of_the_user_is_compared_with_the_papers_row_of_its_method_or_its_label(tmp_path: Path) -> None:
    suite = load_suite("paper_classification")
    run = saved(tmp_path / "some run", "moco_v2")
    row_of = lambda *weights: chosen_rows(suite, weights, False, ())[-1]
    assert row_of(run).name == "ours: some run"
    paper = paper_row_of(row_of(run), suite)
    assert paper is not None and paper.name == "MoCo-v2"
    labelled = row_of(f"DenseCL={run}")
    assert labelled.name == "ours: DenseCL" and labelled.weights == run
    assert paper_row_of(row_of("torchvision:resnet50"), suite) is None
    assert row_of("torchvision:resnet50@IMAGENET1K_V2").weights == "torchvision:resnet50@IMAGENET1K_V2"
    with pytest.raises(CheckpointError, match="holds no backbone"):
        row_of(str(tmp_path))
    with pytest.raises(CheckpointError, match="nowhere is neither a run folder nor a file"):
        chosen_rows(suite, [f"MLS={tmp_path / 'nowhere'}"], True, ())


def test_the_tiny_table_has_the_rows_that_the_scenes_can_make() -> None:
    rows = {row.name: row.weights for row in chosen_rows(load_suite("paper_classification"), (), True, ())}
    assert list(rows) == ["random", "supervised", "MoCo-v2", "MLS"]
    assert rows["random"] == "random" and rows["MLS"].startswith("pretrain:mls_scenes_tiny")


def test_papers_numbers_are_those_of_table_5() -> None:
    rows = {row.name: row.paper for row in load_suite("paper_classification").rows}
    assert rows["MLS"] == [85.8, 71.7, 91.2, 88.5, 81.2, 67.1, 81.9, 63.0, None]
    assert rows["supervised"] == [89.0, 81.3, 96.7, 90.6, 86.7, 58.1, 64.4, 74.7, None]


def test_two_runs_of_one_label_are_one_row_with_differences_to_paper_and_random(
    suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_internet: None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights here"))
    weights = [f"MLS={saved(tmp_path / name, 'mls')}" for name in ("a", "b")]
    suite, said = load_suite(suite_file), []
    table = suite_module.run(suite, tmp_path, Part(weights, seeds=1, overrides=FEW), said.append)
    assert len(table.values["ours: MLS", "linear"]) == 2
    assert "torchvision's weights" in table.absent["published"] and len(said) == 1
    text = as_text(table)
    parts = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    lines = {name: numbers for name, *numbers in parts}
    assert lines["MLS (paper)"] == ["50", "40"] and lines["published (paper)"] == ["80", ""]
    mean = 100 * sum(table.values["ours: MLS", "linear"]) / 2
    floor = 100 * table.values["random", "linear"][0]
    assert lines["ours: MLS − the paper's MLS"][0] == difference(mean, 50.0)
    assert lines["ours: MLS − random"][0] == difference(mean, floor)
    assert "±" in lines["ours: MLS"][0] and "published: left out" in text
    before = (tmp_path / "results.jsonl").read_bytes()
    suite_module.run(suite, tmp_path, Part(weights, seeds=1, overrides=FEW), said.append)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_weights_that_are_a_recipe_are_pretrained_once_for_every_seed(tmp_path: Path) -> None:
    weights = "pretrain:mls_scenes_tiny data.scenes.count=256 optim.epochs=1 monitor.knn_every_epochs=0"
    first, second = (cells.pretrained(weights, seed, tmp_path, quiet=True) for seed in (0, 1))
    assert first != second and (Path(first) / "DONE").is_file()
    stamp = (Path(first) / "DONE").stat().st_mtime_ns
    assert cells.pretrained(weights, 0, tmp_path, quiet=True) == first
    assert (Path(first) / "DONE").stat().st_mtime_ns == stamp
    assert evaluation("knn_scenes", "random").ready(tmp_path, quiet=True).weights == "random"


def test_a_killed_suite_goes_on_and_repeats_no_finished_cell(
    suite_file: Path,
    tmp_path: Path,
    mls_started: Callable[..., list[Command]],
    mls_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    weights = saved(tmp_path / "a", "mls")
    arguments = ["eval", "suite", str(suite_file), "--only", "random", "--weights", f"MLS={weights}", *FEW]
    command = [*arguments, "--seeds", "2", "--out", str(tmp_path / "out")]
    (process,) = mls_started(*command)
    store = Results(tmp_path / "out" / "results.jsonl")
    while len(store.rows(metric="scenes/map")) < 3 and process.running:
        time.sleep(0.02)
    process.send(signal.SIGKILL)
    process.code()
    before = [row["time"] for row in store.rows(metric="scenes/map")]
    done = mls_command(*command)
    assert done.returncode == 0, done.stderr
    rows = store.rows(metric="scenes/map")
    assert [row["time"] for row in rows[: len(before)]] == before
    assert len({row["cell"] for row in rows}) == len(rows) == 8  # two rows, two columns, two seeds
    assert "ours: MLS − random" in done.stdout
