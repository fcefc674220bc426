"""Runs under a real SLURM that are interrupted in every way it knows, and go on as if nothing had been."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mls.engine import Run
from mls.monitor.log import TIMES
from mls.slurm import job_spec, submit
from mls.slurm.profile import load_profile
from mls.tools.runs import runs


def numbers(run: Run) -> list[dict[str, Any]]:
    """All that a run logged but how fast it was: equal floats in JSON are equal bits."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in run.metrics()]


@pytest.fixture
def listed(cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """The line of a run in `mls runs`, which is called in this process: a short run would end before another one has
    started."""
    for name in ("SLURM_CONF", "PATH", "MLS_RUNS"):
        monkeypatch.setenv(name, cluster.environment[name])

    def line(run: str) -> str:
        capsys.readouterr()
        runs()
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {run} "))

    return line


@pytest.mark.long
def test_a_run_that_is_requeued_cancelled_and_submitted_again_equals_one_without_slurm(
    cluster: Any, listed: Callable[[str], str]
) -> None:
    longer = "optim.epochs=20"
    alone, run = cluster.alone("alone", longer), cluster.pretrain("interrupted", longer)
    cluster.wait_until_it_trains(run)
    assert re.search(r"\| running +\| \d+/320 +\| \d+:\d\d +\| \d:\d\d ago ", listed("interrupted"))
    cluster.signal(run, "--signal=USR2")  # saves and is requeued, with no checkpoint but this one
    (stopped,) = cluster.wait_for(lambda: cluster.history(run.path, "stopped"), "it stops")
    assert 20 <= stopped["saved"] < 320

    cluster.wait_until_it_trains(run, stopped["saved"] + 10)
    cluster.box.run_command("scontrol", "requeue", str(job_spec.read(run.path).job))
    cluster.wait_for(lambda: len(cluster.history(run.path, "started")) == 3, "it starts again")
    saves = [start["saved"] for start in cluster.history(run.path, "started")]
    assert saves[:2] == [0, stopped["saved"]] and saves[2] >= saves[1]  # at worst the steps since a save are lost

    cluster.wait_until_it_trains(run, saves[2] + 10)
    cluster.mls("cancel", "interrupted")
    cluster.wait_for(lambda: cluster.state(run.path) == "CANCELLED", "the job ends")
    assert "cancelled" in cluster.jobs("interrupted") and "| cancelled |" in listed("interrupted")
    assert saves[2] < job_spec.last_save(run.path) < 320
    cluster.mls("submit", "pretrain", "--resume", "interrupted", "--profile", "box")
    cluster.wait_until_done(run.path)
    assert numbers(run) == numbers(alone)
    assert "| done " in cluster.jobs("interrupted") and "320/320" in cluster.jobs("interrupted")
    assert "| done " in listed("interrupted")


@pytest.mark.long
def test_two_nodes_of_two_processes_train_together(cluster: Any) -> None:
    nodes = ["--slurm", "nodes=2", "--slurm", "tasks_per_node=2", "--slurm", "gpus_per_node=2"]
    run = cluster.pretrain("four", "optim.epochs=1", *nodes)
    cluster.wait_until_done(run.path)
    starts = cluster.history(run.path, "started")
    assert sorted(start["rank"] for start in starts) == [0, 1, 2, 3]
    assert len({start["node"] for start in starts}) == 2
    assert "on 4 × cpu" in cluster.logs(run.path)


@pytest.mark.long
def test_a_preempted_run_goes_on_with_all_ranks_at_the_same_step(cluster: Any) -> None:
    alone = cluster.alone("alone-with-two", processes=2)
    run = cluster.pretrain("preempted", "--slurm", "nodes=2", "--slurm", "cpus_per_task=4")
    cluster.wait_until_it_trains(run)
    cluster.box.run_command("srun", "--partition=high", "--nodes=2", "--cpus-per-task=4", "true")
    cluster.wait_until_done(run.path)
    again = [start for start in cluster.history(run.path, "started") if start["restart"] == 1]
    (stopped,) = cluster.history(run.path, "stopped")
    assert sorted(start["rank"] for start in again) == [0, 1]
    assert {start["saved"] for start in again} == {stopped["saved"]}
    assert stopped["saved"] >= 20
    assert numbers(run) == numbers(alone)


def test_what_slurm_refuses_is_told_in_its_words_and_leaves_nothing_behind(cluster: Any) -> None:
    wanted = ["mls_scenes_tiny", "--profile", "box", "--slurm", "partition=nowhere", "--name", "refused"]
    refused = cluster.mls("submit", "pretrain", *wanted, fails=True)
    assert "SLURM refuses the job: " in refused.stderr and "invalid partition" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (cluster.runs / "refused").exists()


def test_the_user_sees_the_training_error_and_no_other(cluster: Any) -> None:
    run = cluster.pretrain("mistaken", "data.source=folder", "data.root=/nowhere/at/all")
    cluster.wait_until_failed(run.path)
    shown = cluster.jobs("mistaken")
    assert "failed" in shown and "/nowhere/at/all does not exist" in shown
    assert "Traceback" not in cluster.logs(run.path)
    assert json.loads(Path(run.path, "submission", "job_spec.json").read_text())["job"]


def test_an_exception_is_shown_as_it_was_raised(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    folder = cluster.runs / "raised"
    one = job_spec.create(folder, "json:loads", {"s": "no JSON"}, folder / "submission", "slurm").write()
    submit.submit([one], load_profile("box"), "raised")
    cluster.wait_until_failed(folder)
    assert "JSONDecodeError: Expecting value" in cluster.jobs("raised")
    assert cluster.logs(folder).count("Traceback") == 1
    assert "submitit ERROR" not in cluster.logs(folder)
