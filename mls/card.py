"""A backbone's weights and the card beside them (`backbone.safetensors`, `backbone.json`), written so that they never
disagree and read so that bytes other than those that were written are told. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

from mls.errors import CheckpointError, command
from mls.files import CHECKPOINTS_FULL, changed, checked, read_json, sha256, write_atomically

MOST = 16 << 20  # bytes of a card; ours have a few thousand
MOMENT = 2.0  # seconds in which the two files of a run that goes on training may be read at different saves

Facts = dict[str, Any]


def write(file: Path, weights: bytes, facts: Facts, disk_full: str = CHECKPOINTS_FULL) -> None:
    """Until the weights are in their place, the card also holds the facts of those that they replace: whenever the
    process is killed, the hash says which facts are those of the file that lies there."""
    path = path_of(file)
    facts = checked({**facts, "sha256": hashlib.sha256(weights).hexdigest()})
    write_atomically(path, _text({**facts, "before": _replaced(file)}), disk_full)
    write_atomically(file, weights, disk_full)
    write_atomically(path, _text(facts), disk_full)


def read(file: Path) -> tuple[bytes, Facts] | None:
    """The weights and their card; None where no card lies beside them."""
    until = time.monotonic() + MOMENT
    while cards := _cards(file):
        weights = _content(file)
        digest = hashlib.sha256(weights).hexdigest()
        for facts in cards:
            if facts.get("sha256", digest) == digest:  # version 0.1 wrote no hash
                return weights, facts
        if file.suffix != ".safetensors":  # the same backbone, exported for another program: the hash is not of it
            return weights, {key: value for key, value in cards[0].items() if key not in ("sha256", "check")}
        if time.monotonic() > until:
            raise CheckpointError(f"{file} is damaged, or {path_of(file).name} is not its card{_remedy(file)}")
        time.sleep(0.1)
    return None


def facts_of(file: Path) -> Facts | None:
    """The card alone; None where there is none."""
    cards = _cards(file)
    if len(cards) > 1:  # a save is going on, or was killed
        _, facts = read(file) or (b"", None)
        return facts
    return cards[0] if cards else None


def path_of(file: Path) -> Path:
    return file.with_suffix(".json")


def _cards(file: Path) -> list[Facts]:
    """Of these weights, and of those that they replace; none without a card, or with another program's .json."""
    path = path_of(file)
    if not path.is_file():
        return []
    found = read_json(path, f"remove it, or copy it again with {file.name}", CheckpointError, MOST)
    if not isinstance(found, dict) or not {"architecture", "check"} & found.keys():
        return []
    before = found.pop("before", [])
    for facts in (cards := [found, *(before if isinstance(before, list) else [before])]):
        if wrong := _wrong(facts):
            raise CheckpointError(
                f"{path} cannot be read as the card of {file.name} ({wrong}): copy both again, or take the line "
                '"check" out of it where the change is meant'
            )
    return cards


def _wrong(facts: Any) -> str:
    """What is wrong with a card; "" where nothing is."""
    if not isinstance(facts, dict):
        return "it holds something else than facts"
    if "check" in facts:
        return "it was changed after it was written" if changed(facts) else ""
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    colours = lambda value: isinstance(value, list) and len(value) == 3 and all(map(number, value))
    fits = {
        "architecture": lambda value: isinstance(value, str),
        "input_size": lambda value: number(value) and value == int(value) and 0 < value < 1 << 16,
        "mean": colours,
        "std": lambda value: colours(value) and min(value) > 0,
    }
    missing = [key for key in fits if key not in facts]
    if missing:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    fits |= dict.fromkeys(("step", "epochs"), lambda value: number(value) and value >= 0)
    return next((f"{key} is {str(facts[key])[:40]}" for key in fits if key in facts and not fits[key](facts[key])), "")


def _replaced(file: Path) -> list[Facts]:
    """The facts that may be those of the weights in place: two where a save was killed."""
    try:
        cards = _cards(file) if file.is_file() else []
    except CheckpointError:
        return []  # a broken card is written anew
    return [facts if "sha256" in facts else checked({**facts, "sha256": sha256(file)}) for facts in cards]


def _text(facts: Facts) -> bytes:
    return json.dumps(facts, indent=2).encode() + b"\n"


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None


def _remedy(file: Path) -> str:
    saved = sorted((file.parent / "checkpoints").glob("step-*.pt"))
    export = command("mls export --to safetensors --out", file.parent, saved[-1]) if saved else ""
    return f" (their hashes differ): copy both again{f', or write both from a checkpoint, {export}' if saved else ''}"
