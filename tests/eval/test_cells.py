"""Cells of tables: which are found again, which are measured, in which order."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mls.config import to_yaml
from mls.engine import Run
from mls.errors import ConfigError
from mls.eval import load_protocol
from mls.eval.cells import Cell, config_hash, evaluation, over_seeds
from mls.eval.outcome import Outcome
from mls.eval.pretraining import PROBES, Pretraining, table_of
from mls.recipes import load_config
from mls.results import Results
from mls.tables import render
from mls.tools.bench.evidence import QUIET

FEW = ["data.scenes.count=256", "data.scenes.test_count=200", "data.batch_size=64", "dictionary.size=128"]
FEW += ["optim.epochs=1", "engine.threads=1"]


@dataclass(frozen=True)
class Counting(Cell):
    """Measures its seed and notes that it did."""

    row: str
    seed: int
    log: list[str] = field(default_factory=list)
    dataset: str = "none"

    @property
    def key(self) -> str:
        return f"{self.row}{self.seed}"

    name = key

    def facts(self) -> dict[str, Any]:
        return {}

    def measure(self, folder: Path, quiet: bool) -> Outcome:
        self.log.append(self.key)
        if self.key == "b1":
            raise KeyboardInterrupt
        return Outcome({"map": self.seed / 10}, "", None, 0.0)


def test_all_rows_come_before_the_next_seed_and_a_stopped_table_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    cells = {row: [Counting(row, seed, log) for seed in range(count)] for row, count in (("a", 2), ("b", 1), ("c", 3))}
    cells["b"].append(Counting("b", 1, log))
    try:
        over_seeds(cells, tmp_path)
    except KeyboardInterrupt:
        assert log == ["a0", "b0", "c0", "a1", "b1"]
    log.clear()
    cells["b"].pop()
    found = over_seeds(cells, tmp_path)
    assert log == ["c1", "c2"]
    assert {row: [one.values["map"] for one in seeds] for row, seeds in found.items()} == {
        "a": [0.0, 0.1],
        "b": [0.0],
        "c": [0.0, 0.1, 0.2],
    }
    assert [one.stored_before for one in found["c"]] == [True, False, False]


def test_a_study_that_was_moved_is_found_again(tmp_path: Path) -> None:
    cell = Pretraining("random", "moco_v2_scenes_tiny", FEW, trained=False)
    first = cell.finish(tmp_path / "study")
    assert 0 < first.values["linear"] < 1
    (tmp_path / "study").rename(tmp_path / "elsewhere")
    again = cell.finish(tmp_path / "elsewhere")
    assert again.stored_before and again.values == first.values
    assert Pretraining("random", "moco_v2_scenes_tiny", [*FEW, "optim.lr=0.1"]).key != cell.key


def test_studies_of_version_0_1_are_read(tmp_path: Path) -> None:
    """One row for all numbers, the probes' in per cent; the place of the run counted."""
    config = load_config("moco_v2_scenes_tiny", [*FEW, "run.seed=0", f"run.root={tmp_path}"])
    assert "root" in to_yaml(config)
    values = {"linear": 51.25, "knn": 42.0, "overlap": 0.25, "run": "MoCo-v2-seed0-00000000"}
    Results(tmp_path / "results.jsonl").add(cell="MoCo-v2", config=config_hash(config), seed=0, **values)
    found = Pretraining("MoCo-v2", "moco_v2_scenes_tiny", FEW).finish(tmp_path)
    assert found.stored_before and found.row["run"] == "MoCo-v2-seed0-00000000"
    assert found.values == {"linear": 0.5125, "knn": 0.42, "overlap": 0.25}
    text = render(table_of({"MoCo-v2": [found]}, "backbone", PROBES, ""))
    assert "| MoCo-v2  | 51.2       | 42.0    |" in text
    assert f"1 of 1 runs: measured on {found.date}, not run again (another --out runs all)" in text


def test_imported_plugins_do_not_change_what_a_configuration_is_known_by() -> None:
    plain = load_config("mls_scenes_tiny")
    assert config_hash(replace(plain, run=replace(plain.run, plugins=["/a/b.py"]))) == config_hash(plain)
    assert config_hash(replace(plain, run=replace(plain.run, seed=1))) != config_hash(plain)


def test_a_key_younger_than_stored_results_counts_only_where_it_is_set() -> None:
    plain, half = load_config("mls_scenes_tiny"), load_config("mls_scenes_tiny", ["objective.info_nce_weight=0.5"])
    assert config_hash(plain) == "a3515859"  # as before there was objective.info_nce_weight
    assert config_hash(half) != config_hash(plain)
    regions, new = (load_config("mls_regions_scenes_tiny", few) for few in ([], ["objective.regions.novelty=0.5"]))
    assert config_hash(regions) == "a91e541e" != config_hash(new)


def test_settings_that_cannot_work_leave_no_folder(tmp_path: Path) -> None:
    protocol = load_protocol("detection_scenes", [*FEW[:2], "model.anchors=[6]"])
    with pytest.raises(ConfigError, match="model.anchors has 1 sizes"):
        evaluation(protocol, "resnet_tiny").finish(tmp_path, quiet=True)
    assert list((tmp_path / "eval").glob("detection*")) == []


def test_a_row_that_goes_on_from_a_shared_start_equals_one_trained_from_its_own(tmp_path: Path) -> None:
    few = [*FEW, "data.scenes.count=64", "data.batch_size=16", "dictionary.size=64", "monitor.log_every=1", *QUIET]
    few += ["objective.windows.count=1", "objective.regions.size=16", "objective.windows.size=16", "objective.k=3"]
    few += ["objective.labels_from=regions", "objective.warmup_epochs=0.5"]
    trunk = Pretraining("start", "mls_scenes_tiny", few, own_scenes=True)
    changes = {"windows": ["objective.method=moco_v2"], "own": []}
    for row, change in changes.items():
        own = Pretraining(row, "mls_scenes_tiny", [*few, *change], own_scenes=True)
        shared = replace(own, trunk=trunk, trunk_steps=2)
        assert shared.with_seed(1).config.data.scenes.seed == 1 == shared.with_seed(1).trunk.config.run.seed  # type: ignore[union-attr]
        assert shared.facts() == shared.with_seed(1).facts() and shared.key != own.key
        logs = [cell.run(tmp_path, quiet=True).metrics() for cell in (own, shared)]
        losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
        assert losses[0] == losses[1] and len(losses[0]) == 4
    start = tmp_path / trunk.name
    assert sorted(file.name for file in (start / "checkpoints").iterdir()) == ["step-00000002.pt"]
    assert not (start / "DONE").exists()


HOLD = """import pathlib, sys, time
from mls.locks import locked
with locked(pathlib.Path(sys.argv[1]), "held"):
    print("held", flush=True)
    time.sleep(2)
"""


def test_a_start_that_another_process_trains_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*FEW, "data.scenes.count=64", "data.batch_size=16", "dictionary.size=64", *QUIET]
    trunk = Pretraining("start", "moco_v2_scenes_tiny", few, own_scenes=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / f".{trunk.name}.lock"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        trunk.up_to(2, tmp_path, quiet=True)
        assert other.poll() == 0, "it was not waited for"
    assert "waiting until it has ended" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")  # each of several processes would make the branch
    monkeypatch.setattr("mls.eval.pretraining.create_branch", lambda *given: pytest.fail("a branch was made"))
    monkeypatch.setattr("mls.engine.finish", lambda config, quiet: Run(tmp_path / config.run.name))
    assert replace(trunk, row="own", trunk=trunk, trunk_steps=2).run(tmp_path, quiet=True).path.name.startswith("own-")
