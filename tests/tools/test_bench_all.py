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
    monkeypatch.setattr(together, "BENCHES", {"scale": "scale jobs tables --quick", "probe": "probe --images 3"})
    done = CliRunner().invoke(app, ["bench", "all", "--out", str(tmp_path / "bench")])
    assert "some benches did not end well" in str(done.exception)
    scale, probe = json.loads((tmp_path / "bench/all.json").read_text())["rows"]
    assert (scale["ended"], probe["ended"]) == ("well", "with exit code 2")
    found = json.loads((tmp_path / "bench/scale.json").read_text())
    assert found["command"].startswith("mls bench scale jobs tables --quick") and found["machine"]["cores"]
    assert [row["what"] for row in found["rows"]][:2] == ["mls jobs", "mls results"]
    assert "| mls jobs " in (tmp_path / "bench/scale.txt").read_text()
    assert "--images" in (tmp_path / "bench/probe.txt").read_text()


def test_the_same_command_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def measured(name: str, out: Path) -> dict[str, object]:
        called.append(name)
        if called == ["input", "step-8", "step-32"]:
            raise KeyboardInterrupt
        ended = "with exit code 1" if called == ["input", "step-8"] else "well"
        return {"bench": name, "command": together._command(name, out), "seconds": 1.0, "load": [0, 1], "ended": ended}

    monkeypatch.setattr(together, "_measured", measured)
    words = ["bench", "all", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, words).exit_code == 130
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "input: was measured before" in done.stderr
    assert called[3:] == [name for name in together.BENCHES if name != "input"]
    assert [row["bench"] for row in json.loads((tmp_path / "all.json").read_text())["rows"]] == [*together.BENCHES]
    (tmp_path / "all.json").write_text("[]")
    assert "give --out another folder" in str(CliRunner().invoke(app, words).exception)
