"""`mls bench scale`: what grows with a project: stores of results, lists of jobs, shards, folders, the online probes.
Every row is made of synthetic files of a stated size, and names the target that it is measured against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

METRICS, SEEDS = 3, 3  # of each cell, of each series
SHARD = 10_000  # images
CLASSES = 1000


@dataclass(frozen=True)
class Row:
    what: str
    n: int
    seconds: float  # by the clock
    cpu: float  # of the processor, of child processes too
    target: float | None = None  # seconds at full size
    note: str = ""


def scale(
    chapters: Annotated[list[str] | None, typer.Argument(metavar="CHAPTER", help="Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the size: seconds.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where the files are made; 1 GB must be free.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also keep the rows, as JSON.")] = None,
) -> None:
    """Measure the commands that list and read, on synthetic files of full size.

    tables: `mls results` of 100,000 rows, and 1,000 cells of a finished suite in the same store. jobs: `mls jobs` of
    1,000 runs. reports: `mls report` of 1,000,000 lines of log. listings: commands that only list. shards: the index of
    1,000,000 images in tar shards. folders: 1,000,000 image files. probes: the online probes of 2,000 photographs, in
    the first epoch and in later ones.

    Examples:

        mls bench scale --quick

        mls bench scale tables jobs --out scale.json
    """
    from mls.errors import unknown_name
    from mls.tables import print_table
    from mls.tools.bench.results import write_results

    rows: list[Row] = []
    for chapter in chapters or CHAPTERS:
        if chapter not in CHAPTERS:
            raise unknown_name("chapter", chapter, CHAPTERS)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for row in CHAPTERS[chapter](Path(place), 10 if quick else 1):
                typer.echo(f"— {row.what}: {row.seconds:.2f} s", err=True)
                rows.append(row)
    header = ["what", "n", "seconds", "CPU seconds", "at most", "note"]
    limit = lambda row: "" if row.target is None or quick else f"{row.target:g}"
    print_table(header, [[r.what, f"{r.n:,}", f"{r.seconds:.2f}", f"{r.cpu:.2f}", limit(r), r.note] for r in rows])
    if out is not None:
        write_results(out, [asdict(row) for row in rows])


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    began, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return time.perf_counter() - began, sum(after[:4]) - sum(before[:4])


def command(*words: str, **environment: str) -> tuple[float, float]:
    """Of a whole process, as a user starts it."""
    call = [sys.executable, "-m", "mls.tools", *words]
    return timed(lambda: subprocess.run(call, env={**os.environ, **environment}, capture_output=True, check=True))


def tables(place: Path, smaller: int) -> Iterator[Row]:
    from mls.eval.cells import Evaluation

    count = 100_000 // smaller
    keys = write_store(place / "results.jsonl", count // METRICS)
    yield Row("mls results", count, *command("results", "--store", str(place)), target=5)
    asked = keys[: 1000 // smaller]
    work = lambda: [Evaluation.found_as(key, place) for key in asked]
    yield Row("the cells of a finished suite", len(asked), *timed(work), note=f"in a store of {count:,} rows")


def write_store(path: Path, cells: int) -> list[str]:
    """A store as `mls eval suite` leaves it, each seed with weights of its own; the keys of its cells."""
    from mls.files import checked

    versions = {"mls": "0", "torch": "0", "python": "0"}
    with open(path, "w") as file:
        for cell in range(cells):
            series, seed = divmod(cell, SEEDS)
            row = {"protocol": f"linear_{series % 20}", "task": "linear", "dataset": f"set{series % 20}", "seed": seed}
            row |= {"weights": f"pretrain:recipe{series // 20}", "weights_hash": f"{cell:016x}", "step": 1000}
            row |= {
                "content": f"{series % 20:016x}",
                "settings": f"{series % 20:012x}",
                "root": None,
                "cell": str(cell),
            }
            row |= {"run": f"run-{cell}", "selection": "l2 = 0.001, best on held-out images", "validation": 0.5}
            row |= {"duration": 12.5, "versions": versions, "metrics": METRICS, "time": "2026-01-01T00:00:00"}
            for metric in range(METRICS):
                value = {"metric": f"set{series % 20}/m{metric}", "value": (7 * cell + metric) % 1000 / 1000}
                file.write(json.dumps(checked({**value, **row})) + "\n")
    return [str(cell) for cell in range(cells)]


def jobs(place: Path, smaller: int) -> Iterator[Row]:
    from mls.config import Config, to_yaml
    from mls.slurm import job_spec

    count = 1000 // smaller
    row = {"epoch": 1, **{f"loss/part{part}": 0.123456789 for part in range(20)}, "loss": 1.0, "images_per_second": 9.0}
    log = "".join(json.dumps({"step": step, **row}) + "\n" for step in range(1, 201))
    for number in range(count):
        run = place / f"run-{number:04d}"
        job_spec.create_pretraining(run, run / "submission", "local").submitted_as(str(10**9 + number))
        (run / "metrics.jsonl").write_text(log)
        (run / "config.yaml").write_text(to_yaml(Config()))
        (run / "events.jsonl").write_text(json.dumps({"event": "start", "step": 0, "total": 1000}) + "\n")
        (run / "DONE").touch()
    write_store(place / "results.jsonl", 10 * count // METRICS)
    yield Row("mls jobs", count, *command("jobs", MLS_RUNS=str(place)), target=5, note="200 lines of log each")


def reports(place: Path, smaller: int) -> Iterator[Row]:
    from mls.config import Config, to_yaml

    count = 1_000_000 // smaller
    (place / "config.yaml").write_text(to_yaml(Config()))
    row = {"time": 1.7e9, **{f"loss/part{part}": 0.123456789 for part in range(20)}, "loss": 1.0, "lr": 0.1}
    with open(place / "metrics.jsonl", "w") as log:
        for step in range(1, count + 1):
            log.write(json.dumps({"step": step, "epoch": step // 100, **row}) + "\n")
    call = [sys.executable, "-m", "mls.tools", "report", str(place), "--out", str(place / "report.html")]
    peak = 0

    def work() -> None:
        nonlocal peak
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        peak, process.returncode = used.ru_maxrss, os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, call)

    spent = timed(work)
    note = f"{len(row) + 2} numbers each, peak {peak / 1024:.0f} MiB"
    yield Row("mls report, lines of log", count, *spent, target=10, note=note)


def listings(place: Path, smaller: int) -> Iterator[Row]:
    write_store(place / "results.jsonl", 10)
    for words in ("eval list", "eval list spml_voc2012", "results", "jobs", "config mls_scenes_tiny", "--help"):
        yield Row(f"mls {words}", 1, *command(*words.split(), MLS_RUNS=str(place)), target=1)


def shards(place: Path, smaller: int) -> Iterator[Row]:
    """One shard under many names: what is read of it is read each time."""
    from mls.data.tarindex import load_index

    many = 1_000_000 // SHARD // smaller
    write_shard(place / "shard-0000.tar")
    for number in range(1, many):
        os.link(place / "shard-0000.tar", place / f"shard-{number:04d}.tar")
    paths = sorted(place.glob("*.tar"))
    yield Row("index of tar shards", many * SHARD, *timed(lambda: load_index(paths)), target=15, note="none stored")
    yield Row("the same, stored", many * SHARD, *timed(lambda: load_index(paths)))


def write_shard(path: Path) -> None:
    """As `mls data pack` writes it, with images of 400 bytes."""
    import io
    import tarfile

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(SHARD):
            about = {"path": f"/data/images/{number}.jpg", "crc32": 3_000_000_000 + number, "classes": [number % 80]}
            for suffix, content in (("jpg", b"\xff" * 400), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def folders(place: Path, smaller: int) -> Iterator[Row]:
    from mls.config import DataConfig
    from mls.data.sources import build_source

    each = 1000 // smaller
    for number in range(CLASSES):
        name = place / f"n{number:08d}"
        name.mkdir()
        for image in range(each):
            os.close(os.open(f"{name}/n{number:08d}_{image:06d}.JPEG", os.O_CREAT | os.O_WRONLY))
    work = lambda: build_source(DataConfig(root=str(place)))
    yield Row("image files in folders", CLASSES * each, *timed(work), target=6, note=f"{CLASSES:,} classes")


def probes(place: Path, smaller: int) -> Iterator[Row]:
    """Their reading: the network only takes means, since how long a ResNet-50 takes is another question."""
    import torch

    from mls.config import DataConfig
    from mls.data.sources import build_source
    from mls.monitor.online import OnlineProbes
    from mls.recipes import load_config
    from mls.tools.bench.input import write_photographs

    count = 2000 // smaller
    for name in ("a", "b"):
        write_photographs(place / name, count // 2, (640, 480))
    keys = [f"data.root={place}", "data.source=folder", f"monitor.knn_images={count}", "monitor.linear_every_epochs=0"]
    config = load_config("mls_coco_r50", keys)
    source = build_source(DataConfig(root=str(place), source="folder"))
    found = OnlineProbes.build(config, source)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert found is not None
    for epoch in (1, 2):
        work = lambda epoch=epoch: found(network, epoch, torch.device("cpu"))
        note = f"decoded by {found.workers} processes" if epoch == 1 else "pixels kept"
        yield Row(f"online probes, epoch {epoch}", count, *timed(work), note=note)


CHAPTERS: dict[str, Callable[[Path, int], Iterator[Row]]] = {
    "tables": tables,
    "jobs": jobs,
    "reports": reports,
    "listings": listings,
    "shards": shards,
    "folders": folders,
    "probes": probes,
}
