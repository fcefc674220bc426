"""Runs under a real SLURM that are interrupted in every way it knows, and go on as if nothing had been."""

import json
from pathlib import Path
from typing import Any

import pytest

from mls.engine import Run
from mls.slurm import job_spec, submit
from mls.slurm.profile import load_profile

TIMES = ("images_per_second", "data_wait")


def numbers(run: Run) -> list[dict[str, Any]]:
    """All that a run logged but how fast it was: equal floats in JSON are equal bits."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in run.metrics()]


@pytest.fixture(scope="module")
def alone(cluster: Any) -> Run:
    return cluster.alone("alone")


@pytest.fixture(scope="module")
def alone_with_two(cluster: Any) -> Run:
    return cluster.alone("alone-with-two", processes=2)


def test_a_submitted_run_equals_one_without_slurm(cluster: Any, alone: Run) -> None:
    run = cluster.pretrain("plain")
    cluster.wait_until_done(run.path)
    assert numbers(run) == numbers(alone)
    assert "| done " in cluster.jobs("plain")
    assert "160/160" in cluster.jobs("plain")


def test_two_nodes_of_two_processes_train_together(cluster: Any) -> None:
    run = cluster.pretrain("four", "--slurm", "nodes=2", "--slurm", "tasks_per_node=2", "--slurm", "gpus_per_node=2")
    cluster.wait_until_done(run.path)
    starts = cluster.history(run.path, "started")
    assert sorted(start["rank"] for start in starts) == [0, 1, 2, 3]
    assert len({start["node"] for start in starts}) == 2
    assert "on 4 × cpu" in cluster.logs(run.path)


def test_usr2_saves_requeues_and_changes_no_bit(cluster: Any, alone: Run) -> None:
    run = cluster.pretrain("usr2")
    cluster.wait_until_it_trains(run)
    cluster.signal(run, "--signal=USR2")
    cluster.wait_until_done(run.path)
    (stopped,) = cluster.history(run.path, "stopped")
    first, second = cluster.history(run.path, "started")
    assert first["saved"] == 0 and 20 <= second["saved"] == stopped["saved"] < 160
    assert numbers(run) == numbers(alone)


def test_a_preempted_run_goes_on_with_all_ranks_at_the_same_step(cluster: Any, alone_with_two: Run) -> None:
    run = cluster.pretrain("preempted", "--slurm", "nodes=2", "--slurm", "cpus_per_task=4")
    cluster.wait_until_it_trains(run)
    cluster.box.run_command("srun", "--partition=high", "--nodes=2", "--cpus-per-task=4", "true")
    cluster.wait_until_done(run.path)
    again = [start for start in cluster.history(run.path, "started") if start["restart"] == 1]
    (stopped,) = cluster.history(run.path, "stopped")
    assert sorted(start["rank"] for start in again) == [0, 1]
    assert {start["saved"] for start in again} == {stopped["saved"]}
    assert stopped["saved"] >= 20
    assert numbers(run) == numbers(alone_with_two)


def test_a_bare_requeue_loses_nothing_but_steps_since_the_last_save(cluster: Any, alone: Run) -> None:
    run = cluster.pretrain("requeued", "engine.checkpoint_every=10")
    cluster.wait_until_it_trains(run)
    saved = job_spec.last_save(run.path)
    cluster.box.run_command("scontrol", "requeue", str(job_spec.read(run.path).job))
    cluster.wait_until_done(run.path)
    assert cluster.history(run.path, "started")[-1]["saved"] >= saved > 0
    assert numbers(run) == numbers(alone)


def test_a_cancelled_run_saves_and_stays_cancelled_until_it_is_submitted_again(cluster: Any, alone: Run) -> None:
    run = cluster.pretrain("cancelled")
    cluster.wait_until_it_trains(run)
    cluster.mls("cancel", "cancelled")
    cluster.wait_for(lambda: cluster.state(run.path) == "CANCELLED", "the job ends")
    assert "cancelled" in cluster.jobs("cancelled")
    assert job_spec.last_save(run.path) >= 20
    cluster.mls("submit", "pretrain", "--resume", "cancelled", "--profile", "box")
    cluster.wait_until_done(run.path)
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
