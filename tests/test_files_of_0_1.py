"""Files that version 0.1.0 wrote stay readable: a run stopped at step 6 of 8 and what 0.1.0 made of its last steps, an
export with its certificate, a pack of four images, a store of results. Its network is resnet_tiny of width 2."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mls
from mls.config import DataConfig
from mls.data.sources import build_source
from mls.engine import Run
from mls.models import backbones, foreign, load_backbone
from mls.results import Results, stored_cells
from mls.tools.report import report

FILES = Path(__file__).with_name("files_of_0_1")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    foreign._shapes.cache_clear()
    monkeypatch.setitem(backbones.BACKBONES, "resnet_tiny", partial(backbones.TinyResNet, width=2))
    monkeypatch.chdir(shutil.copytree(FILES, tmp_path / "files"))  # its paths are relative
    yield Path.cwd()
    foreign._shapes.cache_clear()


def test_a_run_goes_on_and_ends_as_it_would_have(written: Path) -> None:
    run = mls.resume("run", ["engine.max_steps=null"], quiet=True)
    expected = [json.loads(line) for line in (written / "run_to_the_end.jsonl").read_text().splitlines()]
    got = Run(written / "run").metrics()
    assert [row["step"] for row in got] == [row["step"] for row in expected] == [2, 4, 6, 8]
    for name in ("loss", "lr", "gradient/norm", "labels/overlap", "health/backbone_rank"):
        assert got[-1][name] == pytest.approx(expected[-1][name], rel=1e-4)
    weights = load_file(written / "run_to_the_end.safetensors")
    for name, value in load_backbone(str(run.path)).state_dict().items():
        torch.testing.assert_close(value, weights[name])


def test_a_run_is_shown(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(["run"])
    assert Path(capsys.readouterr().out.strip()).stat().st_size > 10_000


def test_an_export_still_holds_what_its_certificate_says(written: Path) -> None:
    mls.verify_export("exported/backbone.safetensors")


def test_a_pack_is_read(written: Path) -> None:
    source = build_source(DataConfig(root="packed"))
    assert len(source) == 4
    assert source.class_names == ["a", "b"] and all(source.read(i)[1:4] == b"PNG" for i in range(4))


def test_results_are_read(written: Path) -> None:
    (cell,) = stored_cells(Results(written / "results.jsonl").rows())
    assert cell.values["scenes/map"] == json.loads((written / "results.jsonl").read_text().splitlines()[0])["value"]
