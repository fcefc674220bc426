"""Checkpoints: whole or not there, with a hash inside, tensors and plain Python only (`weights_only=True` loads them).
A broken newest file falls back to the one before it. When one is saved is decided in session.py."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import re
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mls.errors import CheckpointError, refusal
from mls.files import CHECKPOINTS_FULL, atomic_file, remove_unfinished, telling_disk_errors
from mls.signals import SIGNALS

PATTERN = re.compile(r"step-(\d{8})\.pt$")
SEAL, END = 192, b"\nend of an mls checkpoint\n"  # bytes at the end of a file, and how they end


class Checkpoints:
    """The `checkpoints/` folder of a run: `step-00000017.pt`, and so on. A file ends with its seal: a line that holds
    the hash of all before it and whether it is a milestone. (Version 0.1 wrote that into a `.json` beside it.)"""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def save(self, step: int, state: dict[str, Any], milestone: bool = False, prune: bool = True) -> Path:
        with telling_disk_errors(self.folder, CHECKPOINTS_FULL):
            self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path(step), CHECKPOINTS_FULL) as file:
            hashing = HashingFile(file)
            torch.save({**state, "sealed": True}, hashing)  # type: ignore[arg-type]  # it only writes and flushes
            card = {"sha256": hashing.sha256.hexdigest(), "milestone": milestone}
            file.write(json.dumps(card).encode().ljust(SEAL - len(END)) + END)
        if prune:
            self._prune()
        return self.path(step)

    def remove_unfinished(self) -> None:
        """Delete what a process that was killed while it wrote has left. Only the one process that saves may do so."""
        remove_unfinished(self.folder, "step-*")

    def steps(self) -> list[int]:
        found = (PATTERN.search(path.name) for path in self.folder.glob("step-*.pt"))
        return sorted(int(match.group(1)) for match in found if match)

    def newest(self, warn: Callable[[str], None] = print) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None where there is none at all."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                return read(self.path(step), warn)
            except CheckpointError as error:
                if not self.path(step).exists():  # a training that goes on has removed it: there are others now
                    return self.newest(warn)
                warn(f"{error}; going back to the checkpoint before it")
        if steps:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: start a new run")
        return None

    def _prune(self) -> None:
        plain = [step for step in self.steps() if not self._is_milestone(step)]
        for step in plain[: -self.keep_last]:
            self.path(step).unlink(missing_ok=True)
            self.path(step).with_suffix(".json").unlink(missing_ok=True)

    def _is_milestone(self, step: int) -> bool:
        with contextlib.suppress(OSError), open(self.path(step), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - SEAL))
            return bool((_card(file.read()) or _card_beside(self.path(step)) or {}).get("milestone"))
        return False


def read(path: Path, warn: Callable[[str], None] = print) -> dict[str, Any]:
    """Load one checkpoint after checking its hash.

    The file is read once, and what was hashed is what is loaded, also where a file system keeps no cache. While it is
    loaded it takes twice its size of memory: its bytes, and the tensors made from them. (Tensors mapped from the file
    would take less, but a network file system may kill a process that reads them after the file was pruned.)
    """
    try:
        with open(path, "rb") as file:
            content, seal = file.read(max(0, os.fstat(file.fileno()).st_size - SEAL)), file.read()
        sealed = _card(seal)
        if sealed is None:
            content += seal
        card = sealed or _card_beside(path)
        whole = _is_whole_archive(content) if card is None else hashlib.sha256(content).hexdigest() == card["sha256"]
        if not whole:
            raise CheckpointError(f"{path} is damaged: its content does not match its hash")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zip, pickle and OS errors of every kind mean the same here
        raise CheckpointError(refusal(path, error)) from None
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path} is no checkpoint of mls")
    if state.pop("sealed", False) and sealed is None:
        raise CheckpointError(f"{path} is damaged: the hash at its end is gone")
    if card is None:
        warn(f"{path} is of an earlier version and its .json is gone: only the archive's own checksums were checked")
    return state


def _card(seal: bytes) -> dict[str, Any] | None:
    return _parsed(seal.removesuffix(END)) if len(seal) == SEAL and seal.endswith(END) else None


def _card_beside(path: Path) -> dict[str, Any] | None:
    """What version 0.1 wrote beside a checkpoint, unless its process died just before."""
    try:
        return _parsed(path.with_suffix(".json").read_bytes())
    except OSError:
        return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        card = json.loads(text)
    except ValueError:
        return None
    return card if isinstance(card, dict) and "sha256" in card else None


def _is_whole_archive(content: bytes) -> bool:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.testzip() is None


def non_finite(state: Any, where: str = "") -> Iterator[str]:
    """The places of a state's tensors that hold NaN or infinity. Boxes of keys may be unknown, which is NaN."""
    if isinstance(state, torch.Tensor):
        # One pass without a copy, which NaN comes through: 30 times as fast as isfinite on a CPU.
        if state.is_floating_point() and state.numel() and not torch.stack(torch.aminmax(state)).isfinite().all():
            yield where
    elif isinstance(state, Mapping):
        for key, value in state.items():
            if key != "boxes":
                yield from non_finite(value, f"{where}.{key}".lstrip("."))


class HashingFile:
    """A file open for writing whose content is hashed on its way to the disk, so that nothing is read back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
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
