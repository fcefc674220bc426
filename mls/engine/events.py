"""`events.jsonl`: what happened to a run besides its numbers (start, resume, stop, save, skip, a term that joins, a
moment), each with the time and the process; starts also tell the device, the versions and the commit. Lines are only
ever appended: a resume, which takes metrics back to its checkpoint, leaves them alone."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mls

if TYPE_CHECKING:
    import torch


class EventLog:
    """Without a path, as on all ranks but the first, nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @property
    def last_saved(self) -> int:
        """The step whose checkpoint and export were last written; 0: none."""
        content = self.path.read_bytes() if self.path is not None and self.path.is_file() else b""
        written = re.findall(rb'"event": "save".*?"step": (\d+)', content)
        return int(written[-1]) if written else 0

    def write(self, event: str, **facts: Any) -> None:
        if self.path is None:
            return
        from mls import distributed

        row = {"event": event, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        row |= {"host": socket.gethostname(), "pid": os.getpid(), "world": distributed.world()}
        # A full disk must not end the training here: the next checkpoint fails on it, with its sentence.
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:  # one system call a line: threads and kills tear none
                file.write(json.dumps({**row, **facts}).encode() + b"\n")


def read(path: Path, most: int = 1 << 40) -> list[dict[str, Any]]:
    """The events in the last `most` bytes and the first of all; lines that hold none are left out."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    with open(path, "rb") as file:
        lines = [file.readline()]
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - most))
        lines += file.read().splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("event"), str) and type(row.get("step", 0)) is int:
                found.append(row)
    return found


def seconds(event: Mapping[str, Any]) -> float:
    """When it happened, in Unix seconds; 0 where it does not say."""
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


def versions() -> dict[str, str]:
    import torch

    return {"mls": mls.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that runs, and whether its files have changed since; None: it is no checkout. An
    installation inside somebody's repository is not a part of that."""
    folder = Path(mls.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, KeyError):
        if (folder.parent / "origin.json").is_file():  # the snapshot that a job runs (slurm/snapshot.py)
            origin = json.loads((folder.parent / "origin.json").read_bytes())
            changed = (folder.parent / "code.diff").stat().st_size > 0
            return {"commit": origin["commit"], "dirty": changed} if origin["commit"] else None
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    return None
