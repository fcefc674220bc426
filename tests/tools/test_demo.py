"""The demo on few scenes, and the ablations."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import mls.tools.demo as module
from mls.eval import load_protocol
from mls.eval.protocol import fingerprint
from mls.eval.weights import read
from mls.results import Results, stored_cells

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.mark.long
def test_demo_trains_probes_prints_a_table_and_is_not_done_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["data.scenes.count=1024", "data.scenes.test_count=200", "optim.epochs=3", "dictionary.size=512"]
    monkeypatch.setattr(module, "QUICK", [*few, "objective.warmup_epochs=1", "engine.threads=1"])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # of which a second process takes one
    module.demo(quick=True, out=folder)
    assert torch.get_num_threads() == 2
    assert "— MLS with words" in (folder / "second_process.log").read_text()
    torch.set_num_threads(threads)
    first = capsys.readouterr()
    cells = {cell.row["weights"]: cell for cell in stored_cells(Results(folder / "results.jsonl").rows())}
    rows = {name: cell.values for name, cell in cells.items()}
    assert set(rows) == {"random", "MoCo-v2", "MLS", "MLS with words"}
    # Nothing here asserts that MLS beats MoCo-v2: on these scenes it need not (README).
    for learnt in ("MoCo-v2", "MLS"):
        assert rows[learnt]["scenes/linear"] > rows["random"]["scenes/linear"] + 0.03
    assert 0 < rows["MLS"]["scenes/chance"] < 1
    assert "| MLS " in first.out
    assert (folder / "table.md").read_text() in first.out
    assert (folder / cells["MLS"].row["run"] / "DONE").is_file()
    picture = Image.open(folder / "pseudo_positives.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(maxcolors=1 << 20) or []}
    assert {(0xD6, 0x27, 0x28), (0xF2, 0xB7, 0x01)} <= colours

    module.demo(quick=True, out=folder)
    again = capsys.readouterr()
    assert "not run again" in again.out and "not run again" not in first.out
    assert "— MLS" not in again.err
    assert (folder / "table.md").read_text() in again.out


@pytest.mark.long
def test_ablations_print_ours_beside_the_papers_and_go_on_where_they_stopped(
    folder: Path, mls_command: Command
) -> None:
    short = ["data.scenes.count=256", "data.scenes.test_count=200", "data.batch_size=64", "dictionary.size=128"]
    command = ["bench", "ablations", "mls_scenes_tiny", *short, "optim.epochs=1", "objective.warmup_epochs=0"]
    command += ["--grid", "k", "--out", str(folder / "ablations")]
    first = mls_command(*command)
    assert first.returncode == 0, first.stderr
    for k, paper in ((1, "39.7 / 35.9"), (5, "40.0 / 36.1"), (20, "40.1 / 36.2"), (40, "39.2 / 35.4")):
        (line,) = [line for line in first.stdout.splitlines() if line.startswith(f"| k {k} ")]
        assert paper in line
    (run,) = (folder / "ablations").glob("k-5-seed0-*")
    facts = {"protocol": "coco_fpn_1x", "task": "detection", "weights_hash": read(str(run), "").hash, "metrics": 1}
    shipped, shorter = (fingerprint(load_protocol("coco_fpn_1x", more)) for more in ([], ["training.precise_bn=9"]))
    stored = Results(folder / "ablations" / "results.jsonl")
    stored.add(cell="a", settings=shipped, metric="coco2017/box_ap", value=0.401, **facts)
    stored.add(cell="b", settings=shorter, metric="coco2017/mask_ap", value=0.25, **facts)
    stored.add(cell="c", settings=shipped, metric="coco2017/box_ap", value=0.5, **{**facts, "weights_hash": "another"})
    again = mls_command(*command)
    assert "— k" not in again.stderr
    lines = [[cell.strip() for cell in line.split("|")] for line in again.stdout.splitlines() if "|" in line]
    header, row = lines[0], next(line for line in lines if line[1] == "k 5")
    assert dict(zip(header, row, strict=True))["coco_fpn_1x: box AP"] == "40.1"
    assert dict(zip(header, row, strict=True))[f"coco_fpn_1x with other settings ({shorter[:6]}): mask AP"] == "25.0"
    assert [line[:6] for line in lines[2:]] == [
        [cell.strip() for cell in line.split("|")][:6] for line in first.stdout.splitlines() if line.startswith("| k ")
    ][-4:]
    assert "50.0" not in again.stdout
