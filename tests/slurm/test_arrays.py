"""Arrays and chains on a real SLURM: evaluations of a suite, sweeps with evaluations behind them."""

from pathlib import Path
from typing import Any

import pytest

from mls.results import Results

FEW = ["data.scenes.count=200", "data.scenes.test_count=50", "training.epochs=1"]
ROWS = ["--only", "an", "--only", "em"]


@pytest.mark.long
def test_four_evaluations_as_an_array_store_every_result_once(cluster: Any) -> None:
    wanted = ["scenes_single_positive", *FEW, *ROWS, "--seeds", "2", "--tiny"]
    done = cluster.mls("submit", "eval", *wanted, "--profile", "box", "--slurm", "concurrency=3")
    folder = Path(done.stdout.strip())
    cells = sorted(folder.glob("0*"))
    assert len(cells) == 4
    for cell in cells:
        cluster.wait_until_done(cell)
    rows = Results(cluster.runs / "results.jsonl").rows()
    assert len({row["run"] for row in rows}) == 4
    assert len(rows) == len({(row["run"], row["metric"]) for row in rows})
    assert cluster.jobs(folder.name).count("| done ") == 4

    # The table is there without another step of training, and nothing is left to submit.
    table = cluster.mls("eval", "suite", *wanted).stdout
    assert "one seed" not in table and "an" in table
    assert len(Results(cluster.runs / "results.jsonl").rows()) == len(rows)
    assert "nothing to submit" in cluster.mls("submit", "eval", *wanted, "--profile", "box").stderr


@pytest.mark.long
def test_all_processes_of_a_profile_share_a_cell_if_its_task_can_be_shared(cluster: Any, tmp_path: Path) -> None:
    suite = tmp_path / "two.yaml"
    text = """title: Two
compares: backbones
columns:
  - {name: A, protocol: PROTOCOL, set: [SET]}
rows:
  - {name: r, weights: random}
"""
    short = ", ".join([*FEW[:2], "training.steps=4", "seeds=1"])
    suite.write_text(text.replace("PROTOCOL", "segmentation_scenes").replace("SET", short))
    options = ["--profile", "box", "--slurm", "tasks_per_node=2", "--whole"]
    folder = Path(cluster.mls("submit", "eval", str(suite), *options).stdout.strip())
    (cell,) = folder.glob("0*")
    cluster.wait_until_done(cell)
    rows = Results(cluster.runs / "results.jsonl").rows(protocol="segmentation_scenes")
    assert sorted(row["metric"] for row in rows) == [f"scenes_regions/{one}" for one in ("aacc", "macc", "miou")]
    assert {one["rank"] for one in cluster.history(cell, "started")} == {0, 1}

    suite.write_text(text.replace("PROTOCOL", "knn_scenes").replace("SET", ", ".join(FEW[:2])))
    refused = cluster.mls("submit", "eval", str(suite), *options, fails=True)
    assert "learns from frozen features in one process: leave out --whole" in refused.stderr


@pytest.mark.long
def test_a_sweep_is_one_array_with_evaluations_behind_each_run_and_one_table(cluster: Any, tmp_path: Path) -> None:
    suite = tmp_path / "small.yaml"
    options = ", ".join([*FEW, "training.loss=an", "seeds=1"])
    suite.write_text(
        f"title: Small\ncolumns:\n  - {{name: mAP, protocol: spml_scenes, set: [{options}]}}\nrows:\n  - {{name: an}}\n"
    )
    cluster.pretrain("swept", "optim.epochs=2", "--sweep", "objective.k=1,5", "--eval", str(suite))
    runs = sorted((cluster.runs / "swept").glob("k=*"))
    assert [run.name for run in runs] == ["k=1", "k=5"]
    for run in runs:
        (cell,) = (run / "evaluation").glob("0*")
        cluster.wait_until_done(cell)
        assert (run / "DONE").is_file()
    stored = {row["weights"] for row in Results(cluster.runs / "results.jsonl").rows()}
    assert {one for one in stored if not one.startswith("random:")} == {str(run.resolve()) for run in runs}
    table = cluster.jobs("swept")
    assert "| swept/k=1 " in table and "| swept/k=5 " in table
    assert "scenes/map" in table
