"""The code a job runs: a copy made at submission, so that an edit while the job waits or is requeued changes nothing.

The copy has the layout of an installation (mls/eval, mls/slurm and so on inside mls), not of the checkout: a package
that is not found inside the copied `mls` would be imported from an editable install instead.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path

from mls import plugins

PACKAGES = ("eval", "slurm", "tools", "configs")
IGNORED = ("__pycache__", "*.pyc", ".*")


def take(target: Path) -> Path:
    """Copy `mls` with all its packages to `target`/mls, and its git state beside it. Returns `target`."""
    shutil.rmtree(target, ignore_errors=True)
    copy_package(package_folder("mls"), target / "mls")
    for name in PACKAGES:
        copy_package(package_folder(f"mls.{name}"), target / "mls" / name)
    for name, copy in plugin_copies(target).items():
        if name != copy:
            Path(copy).parent.mkdir(exist_ok=True)
            shutil.copy2(name, copy)
    write_origin(package_folder("mls"), target)
    return target


def plugin_copies(target: Path) -> dict[str, str]:
    """The plug-ins of this process, and what a job imports in their place: a file's copy, a module itself."""
    copy_of = lambda name: str(target / "plugins" / Path(name).name) if plugins.is_file_name(name) else name
    return {name: copy_of(name) for name in plugins.loaded()}


def package_folder(name: str) -> Path:
    """Where a package lies, in a checkout or installed."""
    return Path(str(importlib.import_module(name).__path__[0])).resolve()


def copy_package(source: Path, target: Path) -> None:
    """The files that git tracks or would track; all files where git is missing or does not know the folder."""
    wanted = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    if "__init__.py" not in wanted:
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=_ignored)
        return
    for name in wanted:
        if name and (source / name).is_file():  # a deleted file is listed until the deletion is committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def _ignored(folder: str, names: list[str]) -> set[str]:
    """Also the links to other packages: each package is copied on its own."""
    links = {name for name in names if Path(folder, name).is_symlink() and Path(folder, name).is_dir()}
    return links | shutil.ignore_patterns(*IGNORED)(folder, names)


def write_origin(source: Path, target: Path) -> None:
    """Write origin.json (commit, untracked files) and code.diff (changes since the commit)."""
    commit = _git(source, "rev-parse", "HEAD").strip()
    new = _git(source, "ls-files", "--others", "--exclude-standard", "--full-name", ":/").split("\n")
    origin = {"copied_from": str(source), "commit": commit or None, "not_in_git": [name for name in new if name]}
    (target / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
    (target / "code.diff").write_text(_git(source, "diff", "HEAD"))


def _git(folder: Path, *arguments: str) -> str:
    """git's output; empty where there is no git, or no repository that it trusts."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
