"""Attacks on a backbone's weights and their card, and on what reads files of others."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mls import card
from mls.config import AugmentConfig
from mls.engine import checkpoint
from mls.errors import UserError
from mls.eval import weights
from mls.exporting.source import Source
from mls.models import foreign, load_backbone, save_backbone
from mls.tools.bench.faults import fault
from mls.tools.bench.faults.commands import Mount, run

FILE, CARD = "backbone.safetensors", "backbone.json"


def saved(folder: Path, seed: int = 0) -> Path:
    """A run's weights and card."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _pair(seed).items():
        (folder / name).write_bytes(content)
    return folder / FILE


@cache
def _pair(seed: int) -> dict[str, bytes]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        torch.manual_seed(seed)
        facts = {"architecture": "resnet_tiny", "method": "mls", "step": 100 + seed, "epochs": 1.0}
        save_backbone(Path(name), load_backbone("resnet_tiny"), facts, AugmentConfig(size=32))
        return {file: (Path(name) / file).read_bytes() for file in (FILE, CARD)}


READERS: dict[str, Callable[[Path], Any]] = {
    "load": load_backbone,
    "eval": lambda file: weights.read(str(file), ""),
    "export": Source.open,
}


def refused(file: Path, readers: dict[str, Callable[[Path], Any]] = READERS) -> str:
    """ "" where every reader refuses the file with one sentence."""
    return next((what for name, reader in readers.items() if (what := unless_refused(name, reader, file))), "")


def unless_refused(name: str, reader: Callable[[Path], Any], file: Path) -> str:
    weights._read.cache_clear()
    with at_once():
        try:
            reader(file)
        except UserError as error:
            return "" if _is_a_sentence(str(error)) else f"{name} said: {str(error)[:300]!r}"
        except Exception as error:
            return f"{name}: a traceback, {type(error).__name__}: {str(error)[:200]!r}"
    return f"{name} took it"


def _is_a_sentence(text: str) -> bool:
    return bool(text.strip()) and "\n" not in text and len(text) < 600 and "weights_only" not in text


@contextmanager
def at_once() -> Iterator[None]:
    """Without the moment that a run gets to end its save."""
    moment, card.MOMENT = card.MOMENT, 0
    try:
        yield
    finally:
        card.MOMENT = moment


@fault("a bit of the weights flipped", tries=100, quick=4)
def flipped(folder: Path, number: int) -> str:
    file, draws = saved(folder), random.Random(number)
    data = bytearray(file.read_bytes())
    place = draws.randrange(4096 if number % 2 else len(data))  # every other time in the header
    data[place] ^= 1 << draws.randrange(8)
    file.write_bytes(data)
    return refused(file)


@fault("the weights cut short, with zeros to the end or with more behind", tries=60, quick=3)
def cut(folder: Path, number: int) -> str:
    file, draws = saved(folder), random.Random(number)
    data = file.read_bytes()
    start = data[: draws.randrange(len(data))]
    file.write_bytes([start, start.ljust(len(data), b"\0"), data + bytes(draws.randrange(1, 999))][number % 3])
    return refused(file)


@fault("weights and card of two backbones", tries=20, quick=2)
def swapped(folder: Path, number: int) -> str:
    file, other = saved(folder / "a", number), saved(folder / "b", number + 1)
    shutil.copy([other, other.with_name(CARD)][number % 2], folder / "a")
    return refused(file)


@fault("a byte of the card changed", tries=200, quick=6)
def card_changed(folder: Path, number: int) -> str:
    """Where all facts are still the same, nothing is lost."""
    file, draws = saved(folder), random.Random(number)
    path = file.with_name(CARD)
    data = bytearray(path.read_bytes())
    data[draws.randrange(len(data))] = [0, 0xFF, ord("9"), draws.randrange(256)][number % 4]
    path.write_bytes(data)
    try:
        facts, found = (json.loads(content) for content in (_pair(0)[CARD], bytes(data)))
        if all(found.get(key) == value for key, value in facts.items() if key != "check"):
            return ""
    except ValueError:
        pass
    return refused(file)


ODD_CARDS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda facts: b"",
    "no JSON": lambda facts: b"architecture: resnet_tiny",
    "NUL": lambda facts: b"\0" * 300,
    "not UTF-8": lambda facts: json.dumps(facts).encode().replace(b"mls", b"ml\xe9"),
    "deep": lambda facts: b"[" * 100_000,
    "huge": lambda facts: json.dumps({**facts, "more": "x" * (card.MOST + 1)}).encode(),
    "long number": lambda facts: json.dumps(facts).encode().replace(b"100", b"9" * 5000),
    "before": lambda facts: json.dumps({**facts, "before": 5}).encode(),
    "older before": lambda facts: json.dumps({**facts, "sha256": "0", "before": [None]}).encode(),
}
ODD_VALUES: list[Any] = [None, "", "x", [], {}, -1, 1e999, float("nan"), True, [0.5], [0, 0, "0"], [[1], 2, 3], 10**30]
KEYS = ["architecture", "mean", "std", "input_size"]


@fault("a card that is no card, or of version 0.1 with other types and missing keys", tries=69, quick=12)
def odd_cards(folder: Path, number: int) -> str:
    file = saved(folder)
    facts = json.loads(_pair(0)[CARD])
    if number < len(ODD_CARDS):
        content = list(ODD_CARDS.values())[number](facts)
    else:
        del facts["sha256"], facts["check"]
        key = KEYS[number % len(KEYS)]
        value = [*ODD_VALUES, ...][number // len(KEYS) % (1 + len(ODD_VALUES))]
        facts |= {} if value is ... else {key: value}
        if value is ...:
            del facts[key]
        if "architecture" not in facts:
            return ""  # another program's file
        content = json.dumps(facts).encode()
    file.with_name(CARD).write_bytes(content)
    return refused(file, {"load": load_backbone, "export": Source.open})


@fault("kill -9 while weights and card are written over and over", tries=200, quick=3)
def killed(folder: Path, number: int) -> str:
    file = saved(folder)
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(file,))
    writer.start()
    time.sleep(random.Random(number).uniform(0, 0.05))
    writer.kill()
    writer.join()
    return unless_whole(file)


@fault("the writer dies at each rename of a save, twice in a row", tries=16, quick=4)
def killed_at_a_rename(folder: Path, number: int) -> str:
    file = saved(folder)
    for renames in divmod(number, 4):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(file, renames))
        writer.start()
        writer.join()
        if what := unless_whole(file):
            return what
    return ""


def write_for_ever(file: Path, renames: int = 1 << 60) -> None:
    """Files whose content says their step, until so many renames are done."""
    real, done = os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal done
        if done == renames:
            os._exit(9)
        real(*arguments)
        done += 1

    os.replace = replace
    for step in range(1, 1 << 60):
        card.write(file, _content_of(step), {"architecture": "resnet_tiny", "step": step})


def _content_of(step: int) -> bytes:
    return str(step).encode() * 1000


def unless_whole(file: Path) -> str:
    with at_once():
        try:
            data, facts = card.read(file) or (b"", {})
        except UserError as error:
            return str(error)
    whole = data == (_content_of(facts["step"]) if facts["step"] != 100 else _pair(0)[FILE])
    return "" if whole else "the card of another save"


@fault("read while a run writes both files over and over", tries=100, quick=1)
def read_meanwhile(folder: Path, number: int) -> str:
    file = saved(folder)
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(file,))
    writer.start()
    try:
        for _ in range(20):
            data, facts = card.read(file) or (b"", {})
            if facts["step"] != 100 and data != _content_of(facts["step"]):
                return "the card of another save"
        return ""
    except UserError as error:
        return str(error)
    finally:
        writer.kill()
        writer.join()


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(trace: Path) -> list[Any]:
    """Objects each of which makes the file `trace` when a plain pickle reads it."""
    text = f"open({str(trace)!r}, 'w').close()"
    return [
        Call(os.system, f"touch {trace}"),
        Call(os.mkdir, str(trace)),
        Call(eval, text),
        Call(exec, text),
        Call(subprocess.getoutput, f"touch {trace}"),
        Call(shutil.copy, __file__, str(trace)),
        Call(open, str(trace), "w"),
        Call(list, Call(map, os.mkdir, [str(trace)])),
        Call(Path.mkdir, trace),
        Call(os.symlink, "nowhere", str(trace)),
        Call(torch.save, [1], str(trace)),
        Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(trace)))),
        Call(zipfile.ZipFile, str(trace), "w"),
    ]


def _saved_as(content: Any, how: int) -> tuple[str, bytes]:
    """A name and what would be in such a file: of torch's two formats, or of a plain pickle of each protocol."""
    file = io.BytesIO()
    if how < 2:
        torch.save(content, file, _use_new_zipfile_serialization=not how)
        return "file.pth", file.getvalue()
    return ("file.pkl" if how % 2 else "file.pt"), pickle.dumps(content, how - 2)


@fault("a .pt, .pth or .pkl with code in it, read as weights, checkpoint or mmsegmentation's file", tries=312, quick=8)
def code(folder: Path, number: int) -> str:
    trace = folder / "trace"
    objects = hostile(trace)
    one, how = objects[number % len(objects)], number // len(objects) % 8
    inside = [one, {"state_dict": {"conv1.weight": one}}, {"epoch": one, "state_dict": {}}][number // 104 % 3]
    try:
        name, content = _saved_as(inside, how)
    except (pickle.PicklingError, TypeError, AttributeError):
        return ""  # nobody can write that one
    (folder / name).write_bytes(content)
    what = refused(folder / name, {**READERS, "checkpoint": checkpoint.read, "mmseg": _mmseg, "foreign": foreign.read})
    return "its code ran" if os.path.lexists(trace) else what


def _mmseg(file: Path) -> Any:
    from mls.frameworks import installed, mmengine_checkpoints

    return mmengine_checkpoints.read(str(file)) if not installed.missing("mmseg") else foreign.read(file)


def odd_files() -> list[tuple[str, bytes]]:
    """Files that are no weights, by their names."""
    script, zipped, whole = io.BytesIO(), io.BytesIO(), io.BytesIO()
    for buffer, names in ((script, ("data.pkl", "constants.pkl", "version")), (zipped, ("readme.txt",))):
        with zipfile.ZipFile(buffer, "w") as file:
            for name in names:
                file.writestr(f"archive/{name}", "3\n")
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3)}, whole)
    contents = [b"", b"\0" * 1000, b"\n\n", b"PK\x03\x04", b"\x80\x02.", b"\x80\x05N.", b"(", script.getvalue()]
    contents += [zipped.getvalue(), whole.getvalue()[:700], whole.getvalue()[:-30], b"\xff" * 64, b"{}", b"[" * 10_000]
    contents += [(2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}", pickle.dumps([1, 2])]
    contents += [b"\x80\x02]q\x00" + b"(" * 50_000, torch.save.__doc__.encode() if torch.save.__doc__ else b"x"]
    return [(f"file.{suffix}", content) for content in contents for suffix in ("pt", "pkl", "safetensors")]


@fault("an empty, cut or foreign file read as weights or as a checkpoint", tries=57, quick=8)
def odd(folder: Path, number: int) -> str:
    name, content = odd_files()[number]
    (folder / name).write_bytes(content)
    return refused(folder / name, {**READERS, **({"checkpoint": checkpoint.read} if name == "file.pt" else {})})


FULL = [("random:resnet18", target, size) for size in ("256k", "44m") for target in ("torchvision", "timm", "mmseg")]
FULL += [("random:resnet18", "detectron2", size) for size in ("256k", "44m")]
FULL += [("random:resnet_tiny", "safetensors", size) for size in ("64k", "1212k")]


@fault("the disk full in mls export, at the weights or behind them", tries=len(FULL), quick=1)
def full_disk(folder: Path, number: int) -> str:
    out = folder / "out"
    out.mkdir()
    name, target, size = FULL[number]
    code, words = run(folder, "export", name, "--to", target, "--out", str(out), mount=Mount(out, size))
    return unless_told(code, words, "no disk space left for", "choose another --out")


CONFIG = "data: {source: scenes}\nmodel: {backbone: resnet_tiny}\naugment: {size: 32}\n"


@fault("a read-only run folder at --resume, at export and at eval with its results there", tries=3, quick=2)
def read_only(folder: Path, number: int) -> str:
    file = saved(folder / "runs" / "run")
    (file.parent / "config.yaml").write_text(CONFIG)
    few = ["data.scenes.count=40", "data.scenes.test_count=20", "probe.k=[1]"]
    commands = [
        ["pretrain", "--resume", "runs/run"],
        ["eval", "run", "knn_scenes", *few, "--weights", "runs/run"],
        ["export", "runs/run"],
    ]
    code, words = run(folder, *commands[number], mount=Mount(folder / "runs"))
    return unless_told(code, words, "cannot", "Read-only file system")


def unless_told(code: int | None, words: str, *parts: str) -> str:
    last = words.strip().splitlines()[-1] if words.strip() else ""
    if code == 2 and "Traceback" not in words and all(part in last for part in parts):
        return ""
    return f"exit code {code}: {last[:300]}"
