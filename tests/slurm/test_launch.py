"""Launching without SLURM: what would be submitted, the local executor, profiles, the state of a job that ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mls import plugins
from mls.engine import Run
from mls.errors import EXIT_MISTAKE, EXIT_SAVED, ConfigError, LaunchError, Stopped
from mls.slurm import job, job_spec, profile, rendezvous, scheduler, snapshot, submit, watch
from mls.slurm.profile import Profile, load_profile
from mls.slurm.rendezvous import Task

Call = Callable[..., subprocess.CompletedProcess[str]]


def a_spec(folder: Path, cluster: str = "slurm") -> job_spec.JobSpec:
    return job_spec.create(folder, "mls.engine:run", {"folder": str(folder)}, folder / "submission", cluster)


def test_dry_run_prints_the_script_and_makes_nothing(mls_command: Call, tmp_path: Path) -> None:
    wanted = ["--slurm", "nodes=2", "--slurm", "account=vision", "--slurm", "setup=[module load cuda]"]
    done = mls_command(
        "submit", "pretrain", "mls_scenes_tiny", f"run.root={tmp_path}", "--profile", "box", *wanted, "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    script = done.stdout.splitlines()
    assert script[0] == "#!/bin/bash"
    assert {"#SBATCH --nodes=2", "#SBATCH --account=vision", "#SBATCH --requeue", "module load cuda"} <= set(script)
    assert any(line.startswith("#SBATCH --signal=USR2@") for line in script)
    assert "--kill-on-bad-exit=1" in done.stdout and "submitit.core._submit" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_one_array_in_the_script(mls_command: Call, tmp_path: Path) -> None:
    sweep = ["--sweep", "objective.k=1,5,20", "--sweep", "seed=0,1", "--slurm", "concurrency=4"]
    done = mls_command("submit", "pretrain", "mls_scenes_tiny", f"run.root={tmp_path}", *sweep, "--dry-run")
    assert "#SBATCH --array=0-5%4" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("submit pretrain mls_scenes_tiny --cluster slrm", "unknown cluster 'slrm': did you mean 'slurm'?"),
        ("submit pretrain mls_scenes_tiny --profile boxx", "unknown profile 'boxx': did you mean 'box'?"),
        (
            "submit pretrain mls_scenes_tiny --slurm node=2",
            "unknown key 'node' in the command line: did you mean 'nodes'?",
        ),
        ("submit pretrain mls_scenes_tiny --sweep objective.k", "'objective.k' is not a sweep: write key=value,value"),
        ("submit pretrain mls_scenes_tiny --sweep objective.kk=1,2", "did you mean 'objective.k'?"),
        ("submit pretrain mls_scenes_tiny --eval paper_spm", "unknown suite 'paper_spm': did you mean 'paper_spml'?"),
        ("submit pretrain mls_scenes_tiny --cluster local --sweep seed=1,2", "has no queue for several jobs"),
        ("submit pretrain mls_scenes_tiny --rehearse nodekill", "unknown rehearsal 'nodekill'"),
        ("submit pretrain mls_scenes_tiny", "there is no SLURM here (srun is missing)"),
        ("jobs nothing-here", "there is no run nothing-here"),
        ("slurm box start box", "SLURM is not installed here"),
    ],
)
def test_mistakes_are_one_sentence(words: str, sentence: str, mls_command: Call, tmp_path: Path) -> None:
    done = mls_command(*words.split(), MLS_RUNS=str(tmp_path), PATH=str(tmp_path))
    if "box" in words.split() and not done.returncode:
        pytest.skip("SLURM is installed outside PATH")
    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_local_job_trains_in_two_processes_and_is_watched(mls_command: Call, tiny: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    local = ["--cluster", "local", "--name", "here", "--slurm", "tasks_per_node=2"]
    # Ranks and addresses of the submitting shell are not this job's.
    done = mls_command(
        "submit", "pretrain", "mls_scenes_tiny", *tiny, *local, RANK="5", MASTER_PORT="1", WORLD_SIZE="9"
    )
    assert done.returncode == 0, done.stderr
    run = Run(runs / "here")
    _wait_until(lambda: run.done or job_spec.read(run.path).history.rows(event="failed"))
    assert run.done, [file.read_text() for file in job_spec.read(run.path).log_files()]
    assert len(job_spec.read(run.path).history.rows(event="started")) == 2
    (status,) = watch.status_of(watch.find(runs), runs)
    assert (status.state, status.step, status.restarts) == ("done", "48/48", 0)
    assert "on 2 × cpu" in mls_command("jobs", str(run.path), "--lines", "40").stdout


def test_a_cancelled_local_job_saves_and_is_not_started_again(
    mls_command: Call, tiny: list[str], tmp_path: Path
) -> None:
    local = ["--cluster", "local", "--name", "here", "optim.epochs=1000", "engine.checkpoint_every=100000"]
    assert mls_command("submit", "pretrain", "mls_scenes_tiny", *tiny, *local).returncode == 0
    run = Run(tmp_path / "runs" / "here")
    _wait_until(lambda: len(run.metrics()) > 3)
    assert mls_command("cancel", str(run.path)).returncode == 0
    ended = lambda: watch.status_of([job_spec.read(run.path)], tmp_path)[0].state == "stopped"
    _wait_until(ended)
    one = job_spec.read(run.path)
    assert job_spec.last_save(run.path) >= 6
    assert len(one.history.rows(event="started")) == 1
    # Only training got SIGINT: from the controller a second one would follow, at which it ends without saving.
    assert "KeyboardInterrupt" not in (Path(one.logs) / "controller.log").read_text()


def test_debug_runs_in_this_process(mls_command: Call, tiny: list[str], tmp_path: Path) -> None:
    done = mls_command(
        "submit", "pretrain", "mls_scenes_tiny", *tiny, "optim.epochs=1", "--cluster", "debug", "--name", "d"
    )
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "runs" / "d").done


def test_a_job_has_the_plugins_of_its_submission_as_they_were(
    mls_command: Call, tiny: list[str], tmp_path: Path, registries_as_before: None
) -> None:
    plugin = tmp_path / "squared.py"
    plugin.write_text("from mls.core.losses import LOSSES\nLOSSES.add('squared', LOSSES['bce'])\n")
    plugins.load([str(plugin)])
    code = tmp_path / "job" / "code"
    spec = job_spec.create(tmp_path / "job", "mls.losses:build", {"name": "squared"}, tmp_path / "job", "debug").write()
    snapshot.take(code)
    plugin.write_text("raise SystemExit('edited later')")
    start = "import sys; from mls.slurm.job import Job; Job(sys.argv[1])()"  # an evaluation has no run.plugins
    job = subprocess.run([sys.executable, "-c", start, spec.folder], capture_output=True, text=True)
    assert (job.returncode, job.stderr) == (0, f"importing the plug-in {code / 'plugins' / 'squared.py'}\n")


def test_a_submitted_run_names_its_plugin(mls_command: Call, tiny: list[str], tmp_path: Path) -> None:
    plugin = tmp_path / "squared.py"
    plugin.write_text("from mls.core.losses import LOSSES\nLOSSES.add('squared', LOSSES['bce'])\n")
    few = [*tiny, "optim.epochs=1", "objective.loss=squared", "--cluster", "debug", "--name", "d"]
    done = mls_command("submit", "pretrain", "mls_scenes_tiny", "--import", str(plugin), *few)
    assert done.returncode == 0, done.stderr
    assert list(job_spec.read(tmp_path / "runs" / "d").plugins) == [str(plugin)]


def test_a_finished_job_that_is_started_again_does_nothing(tmp_path: Path) -> None:
    one = job_spec.create(tmp_path, "json:loads", {"s": "no JSON"}, tmp_path / "submission", "debug").write()
    (tmp_path / "DONE").touch()
    submit.run_here(one)
    assert one.history.rows() == []


def test_every_profile_that_ships_can_be_submitted() -> None:
    assert {"box", "one_node_8gpu", "two_nodes_8gpu"} <= set(profile.profiles())
    for name in profile.profiles():
        script = submit.sbatch_script(a_spec(Path("run")), load_profile(name), name)
        assert f"#SBATCH --job-name={name}" in script


def test_a_signal_later_than_the_time_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise minutes"):
        load_profile(None, ["minutes=1", "signal_seconds=120"])


def test_a_profile_is_guessed_from_sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.parent.mkdir()
    sinfo.write_text(
        '#!/bin/sh\necho "cpu|64|256000|1-00:00:00|(null)"\necho "gpu*|96+|1031000+|2-00:00:00|gpu:h100:8(S:0-1)"\n'
    )
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sinfo.parent}:{os.environ['PATH']}")
    file = tmp_path / "cluster.yaml"
    file.write_text(profile.guess())
    assert load_profile(file) == Profile(
        tasks_per_node=8, gpus_per_node=8, cpus_per_task=12, memory_gb=906, minutes=1440, partition="gpu"
    )


@pytest.mark.parametrize(
    ("done", "events", "word", "state"),
    [
        (True, [], None, "done"),
        (False, [], "PENDING (Resources)", "queued"),
        (False, [{"event": "started"}], "RUNNING", "running"),
        (False, [{"event": "started"}, {"event": "stopped"}], "PENDING (BeginTime)", "queued again"),
        (False, [{"event": "started"}, {"event": "failed", "error": "no images"}], "FAILED", "failed"),
        (False, [{"event": "started"}, {"event": "stopped"}], "CANCELLED", "cancelled"),
        (False, [{"event": "started"}], "FAILED", "lost"),
        (False, [{"event": "started"}, {"event": "stopped"}], "PREEMPTED", "stopped"),
        (False, [{"event": "started"}], None, "lost"),
        (True, [{"event": "started"}, {"event": "done"}], "FAILED", "done"),
    ],
)
def test_the_end_is_judged_by_the_runs_files_and_slurms_word(
    done: bool, events: list[dict[str, str]], word: str | None, state: str, tmp_path: Path
) -> None:
    one = a_spec(tmp_path).submitted_as("7")
    for event in events:
        one.record(**{"rank": 0, "message": "", **event})
    if done:
        (tmp_path / "DONE").touch()
    found, reason = watch.state_and_reason(one, word)
    assert found == state
    assert done or (word or "does not know") in reason
    assert all(event["error"] in reason for event in events if "error" in event)


def test_ranks_meet_through_a_file_whatever_the_shell_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "99999")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    addresses = []
    for rank in (0, 1):
        rendezvous.set_torch_environment(Task(rank, 2, rank, 2, "4711"), tmp_path)
        addresses.append((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]))
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (str(rank), "2", str(rank))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert addresses[0] == addresses[1] and int(addresses[0][1]) in rendezvous.PORTS
    rendezvous.set_torch_environment(Task(0, 1, 0, 1, "4711"), tmp_path)
    assert "WORLD_SIZE" not in os.environ


def test_a_task_with_one_gpu_of_its_own_uses_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    for rank in (0, 1):
        rendezvous.set_torch_environment(Task(rank, 2, rank, 2, "4712"), tmp_path)
        assert (os.environ["LOCAL_RANK"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("0", "3")


def test_a_taken_port_gives_way_to_the_next() -> None:
    import socket

    first = rendezvous.free_port("one job")
    with socket.socket() as taken:
        taken.bind(("", first))
        assert rendezvous.free_port("one job") != first
    assert rendezvous.free_port("one job") == first


def test_a_job_that_a_person_cancelled_is_not_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for state, wants in {"RUNNING": True, "TIMEOUT": True, "CANCELLED": False, "PENDING": False}.items():
        scontrol.write_text(f"#!/bin/sh\necho JobId=7 JobState={state} Reason=None\n")
        scontrol.chmod(0o755)
        assert scheduler.wants_requeue() == wants


@pytest.mark.parametrize("refusals", [2, 9])
def test_a_busy_scheduler_is_asked_again_and_a_run_that_it_refuses_says_how_it_goes_on(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, spec = [], a_spec(tmp_path).submitted_as("7")

    def requeue(*given: object) -> None:
        asked.append(given)
        if len(asked) <= refusals:
            raise subprocess.CalledProcessError(1, ["scontrol", "requeue", "7"])
        sys.exit(0)  # as submitit does

    monkeypatch.setattr(job, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(scheduler, "wants_requeue", lambda: True)
    monkeypatch.setattr(job.submitit.JobEnvironment, "_usr_sig", staticmethod(lambda: signal.SIGUSR2))
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    stopped = Stopped("a signal came", EXIT_SAVED)
    with pytest.raises(SystemExit) as ended:
        job._end(spec, Task(0, 1, 0, 1, "7"), stopped, requeue)
    assert (len(asked), ended.value.code) == ((3, 0) if refusals == 2 else (4, EXIT_MISTAKE))
    failed = [row["error"] for row in spec.history.rows(job="7") if row.get("event") == "failed"]
    assert len(failed) == (refusals > 2) and all("mls submit pretrain --resume" in one for one in failed)


def test_a_submission_of_version_0_1_is_read(tmp_path: Path) -> None:
    spec = a_spec(tmp_path / "run").submitted_as("7")
    (spec.submission / "job_spec.json").rename(spec.submission / "order.json")
    assert job_spec.is_submitted(tmp_path / "run")
    assert watch.find(tmp_path) == watch.find(tmp_path, "run") == [spec]


def test_a_long_run_is_watched_by_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = a_spec(tmp_path)
    lines = [json.dumps({"step": step, "epoch": 1, "loss": 2.5}) + "\n" for step in range(1, 50_000)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "start", "step": 0, "total": 69_999}) + "\n")
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    monkeypatch.setattr(Run, "config", property(lambda run: pytest.fail("a configuration was resolved")))
    assert watch.progress(spec) == ("49999/69999", "", 2.5)
    assert len(parsed) < 2000


def test_a_folder_that_was_not_submitted_says_so(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="was not submitted"):
        watch.find(tmp_path, str(tmp_path))


def _wait_until(condition: Callable[[], object], limit: float = 300) -> None:
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)
