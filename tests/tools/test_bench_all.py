"""`mls bench all` and `mls bench scale` as a user calls them; how long anything takes is no test's business."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mls.tools.bench import together
from mls.tools.cli import app


@pytest.mark.long
def test_benches_run_one_after_another_and_one_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"scale": f"jobs tables --quick {together.JSON}", "probe": "--images 3"}
    monkeypatch.setattr(together, "QUICK", quick)
    done = CliRunner().invoke(app, ["bench", "all", "--out", str(tmp_path / "bench")])
    assert "some benches did not end well" in str(done.exception)
    scale, probe = json.loads((tmp_path / "bench/all.json").read_text())["rows"]
    assert (scale["ended"], probe["ended"]) == ("well", "with exit code 2")
    found = json.loads((tmp_path / "bench/scale.json").read_text())
    assert found["command"].startswith("mls bench scale jobs tables --quick") and found["machine"]["cores"]
    assert [row["what"] for row in found["rows"]][:2] == ["mls jobs", "mls results"]
    assert "| mls jobs " in (tmp_path / "bench/scale.txt").read_text()
    assert "--images" in (tmp_path / "bench/probe.txt").read_text()
