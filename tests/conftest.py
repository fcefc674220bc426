"""Shared by all tests: shape annotations are checked at run time in the tensor code, and runs are small."""

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

if "PYTEST_XDIST_WORKER" in os.environ:  # two threads on a core that another worker uses are slower than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before anything imports them. Files that only shuffle folders and text gain nothing from it.
CHECKED = [
    "mls.core.dictionary",
    "mls.core.matching",
    "mls.core.losses",
    "mls.core.methods",
    "mls.models",
    "mls.frozen.probe",
    "mls.frozen.metrics",
]
CHECKED += ["mls.distributed", "mls.core.products", "mls.core.sharding", "mls.exporting"]
CHECKED += ["mls.core.health", "mls.core.queried_rows", "mls.monitor.labels"]
install_import_hook(CHECKED, "beartype.beartype")

from mls.tools.bench.faults import commands  # noqa: E402

settings.register_profile("mls", deadline=None)  # how long a test takes on a busy machine decides nothing
settings.load_profile("mls")

TINY = """data.scenes.count=256 data.scenes.test_count=64 data.batch_size=16 dictionary.size=64 objective.k=5
optim.epochs=3 engine.checkpoint_every=5 monitor.log_every=2 monitor.health_every=8 monitor.knn_images=128
monitor.knn_every_epochs=1
model.projection=16 objective.warmup_epochs=0 engine.threads=1""".split()


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Overrides that make the tiny recipe train in seconds: 3 epochs of 16 steps."""
    return [*TINY, f"run.root={tmp_path / 'runs'}"]


@pytest.fixture
def no_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads fail at once."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # an earlier one has read the environment already


@pytest.fixture
def registries_as_before() -> Iterator[None]:
    """What plug-ins have registered is forgotten after the test: others count the names."""
    from mls import plugins
    from mls.config import OBJECTIVES
    from mls.core.losses import LOSSES
    from mls.core.methods import METHODS
    from mls.data.sources import SOURCES
    from mls.eval.data import LAYOUTS
    from mls.exporting import TARGETS
    from mls.models.backbones import BACKBONES

    places = [LOSSES, LOSSES.aliases, OBJECTIVES, SOURCES, LAYOUTS, TARGETS, BACKBONES, plugins._loaded]
    before, path = [dict(place) for place in places], list(sys.path)
    yield
    for place, content in zip(places, before, strict=True):
        place.clear()
        place.update(content)
    for name in set(METHODS) - set(OBJECTIVES):  # our own are imported when they are asked for, and stay
        del METHODS[name]
    added = set(sys.path) - set(path)
    for name, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, "__file__", None) or "") in added:
            del sys.modules[name]
    sys.path[:] = path


Ran = subprocess.CompletedProcess[str]


def started(
    *arguments: object, folder: Path | None = None, script: Path | None = None, processes: int = 1, **more: str
) -> list[commands.Command]:
    words = [str(argument) for argument in ([script, *arguments] if script else arguments)]
    environment = {"MLS_RUNS": os.environ.get("MLS_RUNS"), **more}
    call = commands.call_script if script else None
    return commands.start(folder or Path.cwd(), *words, call=call, environment=environment, processes=processes)


@pytest.fixture
def mls_started() -> Callable[..., list[commands.Command]]:
    """Starts the `mls` command, or a script, in one process or in several that know each other, with `more` in its
    environment."""
    return started


@pytest.fixture(scope="session")
def mls_command() -> Callable[..., Ran]:
    """The same, to its end: what it printed and how it ended."""
    return lambda *arguments, **how: commands.completed(started(*arguments, **how))


def command_line(*arguments: str, processes: int = 1) -> list[str]:
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*python, "-m", "mls.tools", *arguments]


@pytest.fixture
def mls_command_line() -> Callable[..., list[str]]:
    return command_line


@pytest.fixture
def synthetic_run(tmp_path: Path) -> Callable[..., Any]:
    return partial(make_synthetic_run, tmp_path)


@pytest.fixture(scope="module")
def synthetic_run_of_module(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    return partial(make_synthetic_run, tmp_path_factory.mktemp("synthetic"))


def make_synthetic_run(
    folder: Path,
    name: str = "run",
    *overrides: str,
    near: Callable[[int], Sequence[int]] | None = None,
    row: Callable[[int], Mapping[str, float]] = lambda step: {},
    labels: bool = True,
    **changes: Any,
) -> Any:
    """The folder of a run that nobody trained, on the embedded scenes, with what a real one writes beside weights:
    configuration, metrics, events and moments. `near` gives the ids that a query's id matches, `row` changes the values
    of a step's line, `changes` fields of every moment."""
    from mls.engine.events import EventLog
    from mls.engine.run import Run
    from mls.monitor import moments
    from mls.recipes import load_config

    small = ["data.scenes.count=256", "optim.epochs=4", "objective.k=5", f"run.name={name}"]
    run = Run.create(load_config("mls_scenes_tiny", [*small, f"run.root={folder / 'runs'}", *overrides]))
    log = EventLog(run.path / "events.jsonl")
    log.write("start", step=0, total=8)
    for step in range(1, 9):
        values = {"time": 1.8e9 + 10 * step, "loss": 8 - step / 10, "loss/info_nce": 7 - step / 10, "lr": 0.1}
        values |= {"chance/info_nce": 7.62, "chance/multi_label": 0.69, "loss/multi_label_random_rows": 0.65}
        values |= {"loss/multi_label": 0.6, "images_per_second": 900.0, "data_wait": 0.01}
        values |= {"health/backbone_cosine": 0.3, "health/backbone_std": 0.8, "dictionary/fill": min(1, step / 4)}
        line = {"step": step, "epoch": (step + 1) // 2, **values, **row(step)}
        with open(run.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    for step in (2, 4, 8):
        moments.write(run.path, synthetic_moment(step, near, labels, **changes))
        log.write("moment", step=step, seconds=0.1)
    log.write("save", step=8, copy_seconds=0.01, write_seconds=0.1)
    log.write("stop", reason="finished", step=8)
    (run.path / "DONE").write_text("8 steps\n")
    return run


def synthetic_moment(
    step: int, near: Callable[[int], Sequence[int]] | None = None, labels: bool = True, **changes: Any
) -> Any:
    """60 queries of 256 images, each with five matches in both memories: by default random ones."""
    from mls.monitor.moments import LEVELS, Crop, Hub, Labels, Match, Moment, Query, Share

    draw = random.Random(step)

    def box() -> tuple[float, float, float, float]:
        x, y, side = draw.uniform(0, 0.3), draw.uniform(0, 0.3), draw.uniform(0.5, 0.7)
        return round(x, 4), round(y, 4), round(x + side, 4), round(y + side, 4)

    def matches(query: int) -> list[Match]:
        ids = near(query) if near is not None else draw.sample([i for i in range(256) if i != query], 5)
        return [Match(i, box(), draw.randrange(step), 0.9 - 0.02 * rank, 99.9 - rank) for rank, i in enumerate(ids)]

    both = ("features", "projections")
    queries = [
        Query(i, box(), {memory: matches(i) for memory in both}) for i in random.Random(0).sample(range(256), 60)
    ]
    found = {memory: [match for query in queries for match in query.matches[memory]] for memory in both}
    hubs = {memory: Counter((match.id, match.box) for match in found[memory]).most_common(12) for memory in both}
    rising = [0.1, 0.2, 0.3, 0.4, 0.5]
    precision = Labels({memory: [0.4] * 5 for memory in both}, {memory: rising for memory in both}, 0.35)
    fields = {
        "step": step,
        "epoch": step // 2,
        "k": 5,
        "rows": 256,
        "seconds": 0.1,
        "queries": queries,
        "random": [Crop(draw.randrange(256), box()) for _ in range(200)],
        "scores": {memory: [2 * level - 1 for level in LEVELS] for memory in both},
        "hubs": {memory: [Hub(*row, count) for row, count in hubs[memory]] for memory in both},
        "agreement": {memory: Share(0.5, 0.02) for memory in both},
        "agreement_of_memories": Share(0.4, 0.02),
        "own": {memory: 0.1 for memory in both},
        "labels": precision if labels else None,
    }
    return Moment(**{**fields, **changes})
