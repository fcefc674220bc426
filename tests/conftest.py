"""Shared by all tests: shape annotations are checked at run time in the tensor code, and runs are small."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

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
