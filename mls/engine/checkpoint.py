"""Checkpoints: whole or not there, checked by a hash, tensors and plain Python only (`weights_only=True` loads them).
A broken newest file falls back to the one before it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mls.errors import CheckpointError
from mls.files import atomic_file, sha256, write_atomically

PATTERN = re.compile(r"step-(\d{8})\.pt$")


class Checkpoints:
    """The `checkpoints/` folder of a run: `step-00000017.pt`, each with its `.json` (hash, step, milestone or not)."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, step: int, state: dict[str, Any], milestone: bool = False) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        with atomic_file(path) as file:
            torch.save(state, file)
        card = {"step": step, "sha256": sha256(path), "bytes": path.stat().st_size, "milestone": milestone}
        write_atomically(path.with_suffix(".json"), json.dumps(card).encode())
        self._prune()
        return path

    def steps(self) -> list[int]:
        found = (PATTERN.search(path.name) for path in self.folder.glob("step-*.pt"))
        return sorted(int(match.group(1)) for match in found if match)

    def newest(self, warn: Callable[[str], None] = print) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None where there is none at all."""
        steps = self.steps()
        for step in reversed(steps):
            path = self.folder / f"step-{step:08d}.pt"
            try:
                return read(path)
            except CheckpointError as error:
                warn(f"{error}; going back to the checkpoint before it")
        if steps:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: start a new run")
        return None

    def _prune(self) -> None:
        plain = [step for step in self.steps() if not self._card(step).get("milestone")]
        for step in plain[: -self.keep_last]:
            path = self.folder / f"step-{step:08d}.pt"
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)

    def _card(self, step: int) -> dict[str, Any]:
        try:
            return json.loads((self.folder / f"step-{step:08d}.json").read_text())
        except (OSError, ValueError):
            return {}


def read(path: Path) -> dict[str, Any]:
    """Load one checkpoint after checking its hash."""
    try:
        card = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        # The process died between the two renames: the file is whole (it was renamed into place), only unproven.
        card = None
    try:
        if card is not None and sha256(path) != card["sha256"]:
            raise CheckpointError(f"{path} is damaged: its content does not match its hash")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zip, pickle and OS errors of every kind mean the same here
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}") from None
