"""Shared by all tests: shape annotations are checked at run time in the tensor code, and runs are small."""

import json
import os
import subprocess
import sys
import tempfile
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


class CommandServer:
    """A process that runs commands and scripts, each in processes of its own (tests/commands/server.py)."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("commands") / "server.py")]
        pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(
        self, *arguments: str, script: Path | None = None, processes: int = 1, folder: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """The `mls` command, or a script, with `more` in its environment."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            request = {
                "arguments": arguments,
                "script": script,
                "processes": processes,
                "out": out.name,
                "err": err.name,
            }
            request |= {"folder": folder or os.getcwd(), "environment": {**os.environ, "OMP_NUM_THREADS": "1", **more}}
            print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
            code = self.process.stdout.readline()
            assert code, "the server of commands is gone"
            return subprocess.CompletedProcess(arguments, int(code), out.read(), err.read())


@pytest.fixture(scope="session")
def command_server() -> Iterator[CommandServer]:
    server = CommandServer()
    yield server
    server.process.kill()  # not by the end of its input: what a test has forked may hold that pipe open too
    server.process.communicate()


@pytest.fixture(scope="session")
def mls_command(command_server: CommandServer) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the `mls` command in a process of its own, or in several, and gives back what it printed."""
    return command_server.run


def command_line(*arguments: str, processes: int = 1) -> list[str]:
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*python, "-m", "mls.tools", *arguments]


@pytest.fixture
def mls_command_line() -> Callable[..., list[str]]:
    return command_line
