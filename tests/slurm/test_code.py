"""The code a job runs is the code it was submitted with, whatever happens to the checkout; and jobs submit jobs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mls.slurm import job_spec, snapshot

ROOMS = {"mls": "mls", "eval": "mls.eval", "slurm": "mls.slurm", "tools": "mls.tools", "configs": "mls.configs"}

# What setuptools' editable install does: a finder that is asked when the folders on sys.path do not know a module.
FINDER = """
import importlib.util, sys
from pathlib import Path
ROOT = Path({root!r})
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        for package, folder in sorted({rooms!r}.items(), key=lambda pair: -len(pair[0])):
            if name == package or name.startswith(package + "."):
                place = ROOT / folder / Path(*name[len(package) + 1:].split("."))
                if (place / "__init__.py").is_file():
                    return importlib.util.spec_from_file_location(name, place / "__init__.py")
                if place.with_suffix(".py").is_file():
                    return importlib.util.spec_from_file_location(name, place.with_suffix(".py"))
sys.meta_path.append(Editable)
for finder in [one for one in sys.meta_path if one is not Editable and "editable" in repr(one).lower()]:
    sys.meta_path.remove(finder)
"""

# Called in the job: what each room is, now and after a restart.
WITNESS = """
import importlib, json, os, time
from pathlib import Path
def record(rooms, folder):
    imported = {room: [importlib.import_module(name).EDITION, importlib.import_module(name).__file__]
            for room, name in rooms.items()}
    start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    (Path(folder) / f"imported-{start}.json").write_text(json.dumps(imported))
    while start == 0:
        time.sleep(0.1)
"""

SUBMIT = """
import json, sys
from pathlib import Path
from mls.slurm import job_spec, submit
from mls.slurm.profile import load_profile
folder = Path(sys.argv[1])
arguments = {"rooms": json.loads(sys.argv[2]), "folder": str(folder)}
one = job_spec.create(folder, "witness:record", arguments, folder / "submission", "slurm").write()
submit.submit([one], load_profile("box"), "witness")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of its own, installed as `pip install -e` would."""
    copy = tmp_path / "checkout"
    for room, package in ROOMS.items():
        ignore = shutil.ignore_patterns("__pycache__")
        # Links stay links: mls/eval leads to this checkout's eval.
        shutil.copytree(snapshot.package_folder(package), copy / room, symlinks=True, ignore=ignore)
        edit(copy, room, 1)
    site = tmp_path / "site"
    site.mkdir()
    rooms = {package: room for room, package in ROOMS.items()}
    (site / "sitecustomize.py").write_text(FINDER.format(root=str(copy), rooms=rooms))
    (site / "witness.py").write_text(WITNESS)
    return copy


def edit(checkout: Path, room: str, edition: int) -> None:
    """Give a room's __init__.py a number."""
    file = checkout / room / "__init__.py"
    file.write_text(file.read_text().partition("\nEDITION")[0] + f"\nEDITION = {edition}\n")


def submit_witness(cluster: Any, checkout: Path, folder: Path) -> None:
    """From the checkout, in a process that imports it."""
    environment = {**cluster.environment, "PYTHONPATH": str(checkout.parent / "site")}
    command = [sys.executable, "-c", SUBMIT, str(folder), json.dumps(ROOMS)]
    subprocess.run(command, check=True, env=environment, cwd=checkout, timeout=300)


def test_a_requeued_job_runs_the_code_it_was_submitted_with_in_every_room(cluster: Any, checkout: Path) -> None:
    folder = checkout.parent / "job"
    submit_witness(cluster, checkout, folder)
    cluster.wait_for((folder / "imported-0.json").is_file, "the first start")
    for room in ROOMS:
        edit(checkout, room, 2)
    cluster.box.run_command("scontrol", "requeue", str(job_spec.read(folder).job))
    cluster.wait_until_done(folder)
    for start in (0, 1):
        imported = json.loads((folder / f"imported-{start}.json").read_text())
        assert {room: edition for room, (edition, _) in imported.items()} == dict.fromkeys(ROOMS, 1)
        assert all(Path(file).is_relative_to(folder / "submission" / "code") for _, file in imported.values())


def test_the_snapshot_takes_what_git_would_and_says_what_was_changed(checkout: Path, tmp_path: Path) -> None:
    git = lambda *words: subprocess.run(["git", *words], cwd=checkout, check=True, capture_output=True)
    (checkout / ".gitignore").write_text("ignored.py\n")
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.email=a@b.c", "-c", "user.name=a", "commit", "-qm", "first")
    (checkout / "mls" / "ignored.py").write_text("")
    (checkout / "mls" / "untracked.py").write_text("")
    (checkout / "mls" / "streams.py").unlink()
    edit(checkout, "mls", 2)
    snapshot.copy_package(checkout / "mls", tmp_path / "copy" / "mls")
    snapshot.write_origin(checkout / "mls", tmp_path / "copy")
    copied = {path.name for path in (tmp_path / "copy" / "mls").iterdir()}
    assert "untracked.py" in copied and "config.py" in copied
    assert not {"ignored.py", "streams.py"} & copied
    assert "+EDITION = 2" in (tmp_path / "copy" / "code.diff").read_text()
    origin = json.loads((tmp_path / "copy" / "origin.json").read_text())
    assert len(origin["commit"]) == 40 and origin["not_in_git"] == ["mls/untracked.py"]


def test_the_snapshot_needs_no_git(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    snapshot.copy_package(checkout / "mls", tmp_path / "copy")
    names = lambda root: {path.relative_to(root) for path in root.rglob("*.py")}
    assert names(tmp_path / "copy") == names(checkout / "mls")


def test_a_job_submits_a_job_of_another_shape(cluster: Any) -> None:
    folder = cluster.folder / "outer"
    command = [sys.executable, "-m", "mls.tools", "submit", "pretrain", "mls_scenes_tiny", "optim.epochs=1"]
    command += ["data.scenes.count=256", "--profile", "box", "--name", "inner", "--slurm", "nodes=2"]
    outer = [
        "sbatch",
        "--wait",
        "--ntasks=1",
        "--cpus-per-task=3",
        "--gpus-per-node=1",
        "--mem=3G",
        f"--output={folder}",
    ]
    # What a user's shell, or an earlier torchrun, may have left there.
    stale = {"MASTER_PORT": "1", "MASTER_ADDR": "nowhere.invalid", "RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "3"}
    environment = {**cluster.environment, **stale}
    script = f"#!/bin/bash\nsrun {subprocess.list2cmdline(command)}\n"
    done = subprocess.run(outer, input=script, text=True, env=environment, cwd=cluster.folder, timeout=300)
    assert done.returncode == 0, folder.read_text()
    cluster.wait_until_done(cluster.runs / "inner")
    assert "on 2 × cpu" in cluster.logs(cluster.runs / "inner")
