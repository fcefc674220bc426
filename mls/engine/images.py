"""The names of the images that a run learnt from: a number (id) in a checkpoint must never name another image. They are
kept beside the checkpoints, under their hash; a resume on other images is refused, or numbers are mapped by name."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mls.core.dictionary import EMPTY
from mls.data import Source
from mls.data.listing import FileSource, printable
from mls.errors import CheckpointError, command
from mls.files import write_atomically

SHOWN = 3  # names in a sentence


def hash_of_names(source: Source) -> str | None:
    """Of image files, wherever their folder lies, or of the photographs that scenes are composed of; None of other
    sources, whose images are numbered by other means."""
    if not isinstance(source, FileSource):
        return getattr(source, "made_of", None)
    names = source.relative_paths
    digest = hashlib.sha256(names.starts.tobytes())
    digest.update(names.text.tobytes())
    return digest.hexdigest()[:16]


def hash_of_some(source: Source, ids: Tensor) -> str:
    """Of some images in this order: of files by their names, of other sources by their numbers."""
    names = source.relative_paths if isinstance(source, FileSource) else None
    some = [b"%d" % i if names is None else names[i] for i in ids.tolist()]
    return hashlib.sha256(b"\0".join(some)).hexdigest()[:16]


def keep_names(run: Path, source: Source) -> None:
    known = hash_of_names(source)
    if isinstance(source, FileSource) and not (file := _file(run, known or "")).is_file():
        names = b"\0".join(source.relative_paths)
        write_atomically(file, gzip.compress(names, 1, mtime=0))


def accept_other_images(run: Path, state: dict[str, Any], source: Source, accept: bool) -> str:
    """Maps the numbers in a checkpoint's `state`, in place, to those of the same names in `source`, and says what was
    done. Without `accept` other images are an error that says what changed."""
    before, now = state.get("names"), hash_of_names(source)
    count = state.get("images", len(source))
    if (before is None or before == now) and count == len(source):
        return ""
    old = _read(run, before)
    what, new = f"learnt from {count:,} images and data.root has {len(source):,}", {}
    if count == len(source):
        what = f"learnt from {'other images' if isinstance(source, FileSource) else 'scenes of other photographs'}"
    if old is not None and isinstance(source, FileSource):
        new = {name: number for number, name in enumerate(source.relative_paths)}
        gone, added = [name for name in old if name not in new], sorted(new.keys() - set(old))
        what = "learnt from other images: " + " and ".join(
            f"{len(names):,} {word} ({', '.join(map(printable, names[:SHOWN]))}{', …' if names[SHOWN:] else ''})"
            for names, word in ((gone, "are gone"), (added, "are new"))
            if names
        )
    again = command("mls pretrain --resume", run, "--accept-data")
    if not accept:
        advice = f", or let their numbers be mapped by name: {again}" if new else ""
        raise CheckpointError(f"the checkpoint in {run} {what}: give the same images{advice}, or start a new run")
    if old is None or not new:
        raise CheckpointError(f"{run} keeps no names of its images, so that none can be mapped: start a new run")
    mapping = torch.tensor([new.get(name, EMPTY) for name in old])
    emptied = _map(state, mapping)
    empty = ", the dictionary starts empty" if emptied else ""
    return f"the run {what}; numbers are mapped by name{empty}, moments start anew"


def _map(state: dict[str, Any], mapping: Tensor) -> bool:
    """Whether a dictionary held images that are gone: it starts anew, as it does in a new run."""
    places = mapping.tolist()
    state["unreadable"] = [(places[i], why) for i, why in state["unreadable"] if places[i] != EMPTY]
    emptied = False
    for name, memory in state["method"]["_extra_state"].items():
        if not isinstance(memory, dict) or "filled" not in memory:  # no dictionary, such as lists of neighbours
            if memory and "images" not in memory:  # what names its data is made anew on others by its method
                raise CheckpointError(f"numbers in the run's {name} cannot be mapped by name: start a new run")
            continue
        ids = memory["ids"][: memory["filled"]]
        ids.copy_(mapping[ids])
        if (ids == EMPTY).any():
            memory["ids"].fill_(EMPTY)
            memory["filled"], memory["head"], emptied = 0, 0, True
    return emptied


def _file(run: Path, known: str) -> Path:
    return run / f"images-{known}.gz"


def _read(run: Path, known: str | None) -> list[bytes] | None:
    try:
        return gzip.decompress(_file(run, known or "").read_bytes()).split(b"\0")
    except (OSError, EOFError, ValueError):
        return None
