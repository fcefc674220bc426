"""The longer set (`pytest -m slow`): time limits, memory limits, dead nodes, rehearsals, scripts without submitit."""

import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mls.engine import Run
from mls.slurm import job_spec

pytestmark = pytest.mark.slow
LONG = "optim.epochs=2000"  # 32,000 steps: it is stopped long before


def test_a_run_longer_than_its_time_limit_goes_on_until_it_may_not(cluster: Any) -> None:
    limits = ["--slurm", "minutes=1", "--slurm", "signal_seconds=30", "--slurm", "max_timeouts=1"]
    run = cluster.pretrain("overtime", LONG, *limits)
    cluster.wait_until_failed(run.path)
    stops, starts = cluster.history(run.path, "stopped"), cluster.history(run.path, "started")
    assert len(starts) == 2 and starts[1]["saved"] == stops[0]["saved"] > 0
    assert stops[1]["saved"] > stops[0]["saved"]
    shown = cluster.jobs("overtime")
    assert "timed-out too many times" in shown and "mls submit pretrain --resume" in shown


def test_sigterm_alone_saves_and_requeues_too(cluster: Any) -> None:
    run = cluster.pretrain("terminated")
    cluster.wait_until_it_trains(run)
    cluster.signal(run, "--signal=TERM")
    cluster.wait_until_done(run.path)
    (stopped,) = cluster.history(run.path, "stopped")
    assert cluster.history(run.path, "started")[1]["saved"] == stopped["saved"] >= 20


def test_a_killed_process_ends_the_job_and_the_last_save_is_whole(cluster: Any) -> None:
    run = cluster.pretrain("killed", LONG, "engine.checkpoint_every=10", "--slurm", "nodes=2")
    cluster.wait_until_it_trains(run)
    job = job_spec.read(run.path).job
    cluster.box.run_command("srun", f"--jobid={job}", "--overlap", "--nodes=1", "--ntasks=1", "true")
    cluster.signal(run, "--signal=KILL")
    cluster.wait_for(lambda: cluster.state(run.path) in ("FAILED", "CANCELLED"), "the job ends")
    assert job_spec.last_save(run.path) >= 10
    assert "lost" in cluster.jobs("killed") or "cancelled" in cluster.jobs("killed")
    cluster.mls("submit", "pretrain", "--resume", "killed", "--profile", "box", "--slurm", "nodes=2")
    before = job_spec.last_save(run.path)
    cluster.wait_for(lambda: job_spec.last_save(run.path) > before, "it goes on")
    cluster.mls("cancel", "killed")
    cluster.wait_for(lambda: cluster.state(run.path) == "CANCELLED", "it ends")


def test_a_run_that_needs_more_memory_than_it_asked_for_fails_and_says_so(cluster: Any) -> None:
    run = cluster.pretrain("greedy", LONG, "--slurm", "memory_gb=0.1")
    cluster.wait_for(lambda: cluster.state(run.path) in ("FAILED", "OUT_OF_MEMORY"), "SLURM kills it")
    assert "memory limit" in cluster.jobs("greedy")


@pytest.mark.parametrize("what", ["preempt", "timeout", "kill-node", "requeue"])
def test_a_rehearsal_survives(what: str, cluster: Any, tmp_path: Path) -> None:
    small = ["data.scenes.count=256", "data.scenes.test_count=64", "data.batch_size=16", "dictionary.size=64"]
    small += ["objective.k=5", "monitor.log_every=2", "monitor.knn_every_epochs=0", "engine.threads=1", LONG]
    done = cluster.mls("submit", "pretrain", "mls_scenes_tiny", *small, "--profile", "box", "--rehearse", what)
    assert ": survived" in done.stdout


@pytest.mark.parametrize("name", ["pretrain_srun.sbatch", "pretrain_torchrun.sbatch"])
def test_the_example_without_submitit_is_requeued_and_finishes(name: str, cluster: Any, tmp_path: Path) -> None:
    script = tmp_path / name
    shutil.copy(str(files("mls.slurm") / "examples" / name), script)
    small = "mls_scenes_tiny data.scenes.count=256 data.scenes.test_count=64 data.batch_size=16 dictionary.size=64"
    small += " objective.k=5 engine.threads=1 monitor.log_every=2 monitor.knn_every_epochs=0 optim.epochs=20"
    options = ["--gpus-per-node=0", "--cpus-per-task=2", "--time=60", "--mem=6G", f"--output={tmp_path}/%j.log"]
    environment = {**cluster.environment, "RUN": str(cluster.runs / script.stem), "CONFIG": small, "PROCESSES": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    job, run = done.stdout.strip(), Run(cluster.runs / script.stem)
    log = tmp_path / f"{job}.log"
    failed = lambda: "JobState=FAILED" in cluster.box.run_command("scontrol", "-o", "show", "job", job)
    cluster.wait_for(lambda: len(run.metrics()) > 5 or failed(), f"{name} trains")
    assert not failed(), log.read_text()
    cluster.box.run_command("scancel", "--signal=TERM" if "torchrun" in name else "--signal=USR2", job)
    cluster.wait_for(lambda: run.done or failed(), f"{name} is done")
    assert run.done, log.read_text()
    printed = log.read_text()
    assert "resumed after step" in printed and "on 4 × cpu" in printed
