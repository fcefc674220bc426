"""Checkpoints: whole or not there, checked by a hash, tensors and plain Python only (`weights_only=True` loads them).
A broken newest file falls back to the one before it. When one is saved is decided in session.py."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mls.errors import CheckpointError, refusal
from mls.files import atomic_file, telling_disk_errors, write_atomically
from mls.signals import SIGNALS

PATTERN = re.compile(r"step-(\d{8})\.pt$")


class Checkpoints:
    """The `checkpoints/` folder of a run: `step-00000017.pt`, each with its `.json` (hash, step, milestone or not)."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, step: int, state: dict[str, Any], milestone: bool = False) -> Path:
        with telling_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        with atomic_file(path) as file:
            hashing = HashingFile(file)
            torch.save(state, hashing)  # type: ignore[arg-type]  # it only writes and flushes
            # A step may be saved twice. The old hash must go before the new file takes its place: a process that is
            # killed in between then leaves a whole file without a hash, never one with the hash of another.
            path.with_suffix(".json").unlink(missing_ok=True)
        card = {"step": step, "sha256": hashing.sha256.hexdigest(), "bytes": hashing.bytes, "milestone": milestone}
        write_atomically(path.with_suffix(".json"), json.dumps(card).encode())
        self._prune()
        return path

    def remove_unfinished(self) -> None:
        """Delete what a process that was killed while it wrote has left. Only the one process that saves may do so."""
        for path in self.folder.glob(".step-*.tmp"):
            path.unlink(missing_ok=True)

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
    """Load one checkpoint after checking its hash.

    The file is read once, and what was hashed is what is loaded, also where a file system keeps no cache. While it is
    loaded it takes twice its size of memory: its bytes, and the tensors made from them. (Tensors mapped from the file
    would take less, but a network file system may kill a process that reads them after the file was pruned.)
    """
    try:
        card = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        # The process died between the two renames: the file is whole (it was renamed into place), only unproven.
        card = None
    try:
        content = path.read_bytes()
        if card is not None and hashlib.sha256(content).hexdigest() != card["sha256"]:
            raise CheckpointError(f"{path} is damaged: its content does not match its hash")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zip, pickle and OS errors of every kind mean the same here
        raise CheckpointError(refusal(path, error)) from None


class HashingFile:
    """A file open for writing whose content is hashed on its way to the disk, so that nothing is read back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class Copied(dict[str, Any]):
    """A part of a state that was copied to host memory already, such as a memory gathered from all processes."""


def snapshot(state: Any) -> Any:
    """A copy of a state in host memory, which goes on being what it is while training changes the original."""
    if isinstance(state, Copied):
        return dict(state)
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        copied: Any = copy.copy(state)  # of the same kind: a module's state carries versions as an attribute
        for key, value in state.items():
            copied[key] = snapshot(value)
        return copied
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    return state


class BackgroundWriter:
    """Writes beside training, one thing at a time. An error is held in `error` until someone asks for it."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.seconds = 0.0  # that the last write took
        self._thread: threading.Thread | None = None

    def start(self, write: Callable[[], None]) -> None:
        self.wait()
        # A daemon: a second Ctrl-C ends the process without waiting for a file that appears only when it is whole.
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, write: Callable[[], None]) -> None:
        # Signals are for the main thread, which they wake while it waits for this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        began = time.monotonic()
        try:
            write()
        except Exception as error:
            self.error = error
        self.seconds = time.monotonic() - began
