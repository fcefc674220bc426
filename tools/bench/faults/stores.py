"""Stores of results, logs and features that are damaged, killed or full: no other number is ever read, nothing whole is
lost, and what is left out is told."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mls.tools.bench.faults import fault
from mls.tools.bench.faults.commands import Command, run
from mls.tools.bench.faults.readers import cached, readers_of_features

CELLS, METRICS = 6, ("voc07/map", "voc07/top1", "voc07/f1")
FOREIGN = [b"5", b"null", b"[" * 100_000, b"[]", b'{"cell": []}', b'{"metric": 3, "value": 1}', b"\x00" * 40, b"\xff{"]
FOREIGN += [b'{"cell": "0", "metric": "voc07/map", "value": "0.5"}', b'{"duration": {}}']
ODD = [*FOREIGN, b"{}", b'{"step": 5}', b'{"step": 1e999, "epoch": 1}', b'{"step": 3, "epoch": 1, "loss": "high"}']
ODD += [b'{"step": -1, "epoch": 1}', b'{"step": 2, "epoch": 1, "lr": NaN}', b'{"step": 2, "epoch": 1, "lr": 1e308}']


@fault("a bit of results.jsonl flipped", tries=1000, quick=20)
def bit_of_a_row(folder: Path, number: int) -> str:
    store = filled(folder)
    written = wanted(store)
    flip_a_bit(store.path, random.Random(number))
    return other_numbers(store, written)


@fault("lines of something else in results.jsonl, then mls results and another cell", tries=200, quick=4)
def foreign_lines(folder: Path, number: int) -> str:
    from mls.tools.results import results

    store, draw = filled(folder), random.Random(number)
    written = wanted(store)
    lines = store.path.read_bytes().splitlines()
    for _ in range(draw.randint(1, 4)):
        lines.insert(draw.randrange(len(lines)), draw.choice(FOREIGN))
    store.path.write_bytes(b"\n".join(lines) + b"\n")
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        for format in ("markdown", "csv", "json"):
            results([], store.path, format)  # type: ignore[arg-type]
    if told.getvalue().count("left out") != 1:
        return f"not told once: {told.getvalue()[:200]!r}"
    store.add_all([{"cell": "more", "metric": "m", "value": 1.0, "metrics": 1}])
    return other_numbers(store, written, all_of_them=True)


@fault("kill -9 after each single change that storing numbers makes, and half-way through a write", tries=100, quick=4)
def killed_writer(folder: Path, number: int) -> str:
    store = filled(folder)
    written = wanted(store)
    if number % 2:
        run(folder, folder, call=add_more, dies_at=1 + number // 2 % 3)
    else:
        with open(store.path, "ab") as file:  # of one write of several pages any part may have been done
            file.write(json.dumps({"cell": "new"}).encode()[: number % 15])
    add_more(folder)
    other = other_numbers(store, written, all_of_them=True)
    return other if other or store.cell("new") else "what was stored afterwards is not there"


@fault("a full disk while numbers are stored", tries=100, quick=4)
def full_store(folder: Path, number: int) -> str:
    store = filled(folder)
    before = store.path.read_bytes()
    told = on_a_full_disk(lambda: add_more(folder), len(before) + random.Random(number).randrange(300), number)
    if not told.startswith("cannot write the result to ") or store.path.read_bytes() != before:
        return f"half of it is there, or nothing was told: {told!r}"
    add_more(folder)
    return "" if store.cell("new") else "nothing could be stored afterwards"


@fault("four processes that store at once, one of them killed", tries=20)
def four_writers(folder: Path, number: int) -> str:
    writers = [Command(folder, folder, name, call=add_many) for name in range(4)]
    time.sleep(random.Random(number).uniform(0, 0.1))
    writers[0].send()
    codes = [writer.code() for writer in writers[1:]]
    cells = {cell.row["cell"]: cell.values for cell in stored(folder)}
    missing = [f"{name}-{one}" for name in (1, 2, 3) for one in range(100) if f"{name}-{one}" not in cells]
    return "" if codes == [0, 0, 0] and not missing else f"{codes}, missing: {missing[:3]}"


@fault("odd lines in metrics.jsonl and an odd card, then mls report", tries=200, quick=3)
def odd_report(folder: Path, number: int) -> str:
    from mls.tools.report import report

    draw, run_folder = random.Random(number), made_run(folder)
    lines = (run_folder / "metrics.jsonl").read_bytes().splitlines()
    for _ in range(number % 5):
        lines.insert(draw.randrange(len(lines)), draw.choice(ODD))
    (run_folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    card = (run_folder / "backbone.json").read_bytes()
    changed = (card[: draw.randrange(len(card))], b"[" * 100_000, b"5", b'{"step": "x", "epochs": 0}', b"\xff", card)
    (run_folder / "backbone.json").write_bytes(draw.choice(changed))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        report([str(run_folder)])
    return "" if (run_folder / "report.html").read_text().rstrip().endswith("</html>") else "the page is not whole"


@fault("a full disk while the report is written", tries=40, quick=2)
def full_report(folder: Path, number: int) -> str:
    from mls.tools.report import report

    run_folder = made_run(folder)
    told = on_a_full_disk(lambda: report([str(run_folder)]), random.Random(number).randrange(4000), number)
    left = [path.name for path in run_folder.glob("*report*")] + [path.name for path in run_folder.glob(".*")]
    wrong = "keep_last" in told or "resume" in told or "report.html" not in told
    return f"told {told!r}, left {left}" if wrong or left else ""


@fault("kill -9 after each single change that caching features makes", tries=100, quick=4)
def killed_features(folder: Path, number: int) -> str:
    cache_of = {"MLS_CACHE": str(folder)}
    run(folder, call=computed, environment=cache_of, dies_at=1 + number % undisturbed()[1])
    return unless_same_features(folder)


@fault("a full disk while features are cached", tries=100, quick=3)
def full_features(folder: Path, number: int) -> str:
    with environment(MLS_CACHE=str(folder)):
        told = on_a_full_disk(computed, random.Random(number).randrange(20_000), number)
    if "features" not in told or "engine.keep_last" in told:
        return f"told {told!r}"
    return unless_same_features(folder)


@fault("a bit of cached features flipped", tries=200, quick=3)
def bit_of_features(folder: Path, number: int) -> str:
    draw = random.Random(number)
    with environment(MLS_CACHE=str(folder)):
        computed()
    flip_a_bit(draw.choice([path for path in folder.rglob("features.*")]), draw)
    return unless_same_features(folder)


@fault("a bit of neighbour lists flipped", tries=300, quick=5)
def bit_of_lists(folder: Path, number: int) -> str:
    import torch

    from mls.core.matching import Matches
    from mls.core.neighbour_lists import NeighbourLists
    from mls.errors import CheckpointError

    ids = torch.arange(64).view(16, 4) % 16
    lists, file = NeighbourLists.of(Matches(ids, ids / 16), {"images": "of a fault", "grid": 3}), folder / "lists"
    lists.save(file)
    flip_a_bit(file, random.Random(number))
    try:
        read = NeighbourLists.open(file)
    except CheckpointError:
        return ""
    same = read.ids.equal(lists.ids) and read.scores.equal(lists.scores) and read.identity == lists.identity
    return "" if same else "other lists without a word"


@fault("NaN or infinity in features or weights, at every reader", tries=140, quick=14)
def not_finite(folder: Path, number: int) -> str:
    import torch

    from mls.errors import UserError

    readers, draw = readers_of_features(), random.Random(number)
    name, read = list(readers.items())[number % len(readers)]
    bad = draw.choice([torch.nan, torch.inf, -torch.inf])
    with environment(MLS_CACHE=str(folder)):
        try:
            read(
                folder, lambda tensor: tensor.view(-1).index_fill_(0, torch.tensor(draw.randrange(tensor.numel())), bad)
            )
        except UserError as error:
            told = str(error)
        else:
            return f"{name} says nothing"
    stored_rows = [path for path in folder.rglob("features.json") if name != "an old cache"]
    wrong = "hold NaN or infinity, so nothing is measured with them" not in told or stored_rows
    return f"{name}: {told}, stored {stored_rows}" if wrong else ""


# ------------------------------------------------------------------------------------------------------------- helpers


def flip_a_bit(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def filled(folder: Path) -> Any:
    from mls.results import Results

    store = Results(folder / "results.jsonl")
    for cell in range(CELLS):
        fields = {"cell": f"{cell}", "seed": cell, "metrics": len(METRICS), "weights": "random", "protocol": "knn"}
        store.add_all([{"metric": metric, "value": cell + 0.123456789, **fields} for metric in METRICS])
    return store


def add_more(folder: Path) -> None:
    from mls.results import Results

    Results(folder / "results.jsonl").add_all(
        [{"cell": "new", "metric": metric, "value": 0.5, "metrics": len(METRICS)} for metric in METRICS]
    )


def add_many(folder: Path, name: int) -> None:
    from mls.results import Results

    for one in range(100):
        Results(folder / "results.jsonl").add_all(
            [{"cell": f"{name}-{one}", "metric": "m", "value": 1.0, "metrics": 1}]
        )


def stored(folder: Path) -> Any:
    from mls.results import Results, stored_cells

    return stored_cells(Results(folder / "results.jsonl").rows())


def wanted(store: Any) -> dict[tuple[Any, Any], Any]:
    return {(row["cell"], row["metric"]): row["value"] for row in store.rows()}


def other_numbers(store: Any, written: dict[tuple[Any, Any], Any], all_of_them: bool = False) -> str:
    """What is read that was not written, or not read and not told."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        read = store.rows()
    numbers = {(row.get("cell"), row["metric"]): row.get("value") for row in read if row.get("metric")}
    for key, value in numbers.items():
        if value != written.get(key, value) or (key not in written and key[0] not in ("new", "more")):
            return f"{key} = {value} was never stored"
    lost = [key for key in written if key not in numbers]
    if lost and (all_of_them or "left out line" not in told.getvalue()):
        return f"lost: {lost}, told: {told.getvalue()!r}"
    for cell in range(CELLS):
        values = store.cell(f"{cell}")
        if values is not None and values.values != {metric: written[f"{cell}", metric] for metric in METRICS}:
            return f"cell {cell} has {values.values}"
    return ""


def on_a_full_disk(write: Callable[[], object], room: int, number: int) -> str:
    """What a user is told by a write that ends after `room` bytes of a file (every second time) or at its flush."""
    from mls.errors import UserError

    before, fsync = resource.getrlimit(resource.RLIMIT_FSIZE), os.fsync

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if number % 2:
                os.fsync = no_space
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            write()
    except UserError as error:
        return str(error)
    finally:
        os.fsync = fsync
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def made_run(folder: Path) -> Path:
    """A run with a log and a card, and nothing to draw crops of."""
    from mls.config import to_yaml
    from mls.recipes import load_config

    run_folder = folder / "runs" / "run"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text(to_yaml(load_config("mls_scenes_tiny")))
    rows = [{"step": step, "epoch": 1 + step // 4, "loss": 2.0 / step, "lr": 0.1} for step in range(1, 9)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_folder / "backbone.json").write_text(json.dumps({"step": 8, "epochs": 2.0, "architecture": "resnet_tiny"}))
    return run_folder


def computed() -> Any:
    """Features of 700 images, in three blocks."""
    import torch

    return cached({"of": "a fault"}, torch.arange(700 * 8, dtype=torch.float32).view(700, 8))


def unless_same_features(folder: Path) -> str:
    with environment(MLS_CACHE=str(folder)):
        found = computed()
    (file,) = folder.rglob("features.npy")
    if file.read_bytes() != undisturbed()[0]:
        return "other features than those of a run undisturbed"
    left = [path.name for path in found.folder.iterdir() if path.name not in ("features.npy", "features.json")]
    return f"left behind: {left}" if left else ""


@cache
def undisturbed() -> tuple[bytes, int]:
    folder = Path(mkdtemp(prefix="mls-fault-"))
    command = Command(folder, call=computed, environment={"MLS_CACHE": str(folder)}, dies_at=0)
    assert command.code() == 0, command.words
    (file,) = folder.rglob("features.npy")
    return file.read_bytes(), command.changes
