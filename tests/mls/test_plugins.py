"""Plug-ins: how they are named, found, refused and carried along with a run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mls
from mls import losses, plugins
from mls.config import to_yaml
from mls.core.losses import LOSSES
from mls.engine import Run
from mls.errors import ConfigError
from mls.models import backbones
from mls.recipes import load_config, resolve

Call = Callable[..., subprocess.CompletedProcess[str]]

LOSS = """
from mls import losses

@losses.register("{name}")
class Mine(losses.Loss):
    def entries(self, logits, labels, *_):
        return (logits - labels) ** 2
"""
BACKBONE = """
from torch import nn
from mls.models import backbones

@backbones.register("flat")
class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.feature_dim = 12
        self.conv1 = nn.Conv2d(3, 12, 8, stride=8)

    def forward(self, images):
        return self.conv1(images).mean((2, 3))
"""


@pytest.fixture(autouse=True)
def _registries_afterwards_as_before(registries_as_before: None) -> None:
    pass


@pytest.fixture
def loss_file(tmp_path: Path) -> Path:
    file = tmp_path / "squared.py"
    file.write_text(LOSS.format(name="squared"))
    return file


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


# ---------------------------------------------------------------------------------------------- naming, finding


def test_a_file_is_imported_once_and_told(
    loss_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(loss_file.parent)
    assert plugins.load(["squared.py", str(loss_file)]) == [str(loss_file)] * 2
    assert plugins.loaded() == [str(loss_file)]
    assert capsys.readouterr().err == f"importing the plug-in {loss_file}\n"
    assert "squared" in losses.names()
    assert losses.build("squared", temperature=2).temperature == 2.0


def test_a_module_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "cubed.py").write_text(LOSS.format(name="cubed"))
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.load(["a_package.cubed"]) == ["a_package.cubed"]
    assert "cubed" in losses.names()


MISTAKES = {
    "raise ValueError('no')": r"the plug-in .*/wrong\.py cannot be imported \(ValueError: no, line 1\): correct it",
    "a = 1\nb = = 2": r"the plug-in .*/wrong\.py cannot be imported \(SyntaxError: .* line 2\)\): correct it",
    "import nothing_like_it": r"the plug-in .*/wrong\.py needs nothing_like_it: install it",
    LOSS.format(name="bce"): "there is a loss called 'bce' already: give the new one another name",
}


@pytest.mark.parametrize("content", MISTAKES, ids=["raises", "syntax", "needs", "twice"])
def test_a_mistake_in_a_plugin_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(content)
    with pytest.raises(ConfigError, match=f"^{MISTAKES[content]}$"):
        plugins.load([str(tmp_path / "wrong.py")])
    assert plugins.loaded() == []
    assert "wrong" not in sys.modules


NAMES = {
    "nowhere.py": r"there is no plug-in file .*/nowhere\.py: put it back, or say where it is now with --import",
    "json.no_such_part": r"there is no plug-in module json\.no_such_part: install it, or name its file .*",
    "no_such_module": r"there is no plug-in module no_such_module: install it, or name its file .*",
    "colorsys.py": r"the plug-in .*/colorsys\.py is called like the module colorsys of .*: rename it",
    "two.dots.py": r"the plug-in .*/two\.dots\.py has no name that can be imported: .*",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_imported_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("colorsys.py", "two.dots.py"):
        (tmp_path / file).write_text("")
    with pytest.raises(ConfigError, match=f"^{NAMES[name]}$"):
        plugins.load([name])


def test_the_same_definition_may_be_executed_again(loss_file: Path) -> None:
    plugins.load([str(loss_file)])
    first = LOSSES["squared"]
    exec(compile(loss_file.read_text(), str(loss_file), "exec"), {"__name__": "squared"})  # as a notebook's cell
    assert LOSSES["squared"] is not first


def package(folder: Path, content: str) -> dict[str, str]:
    """An installed distribution with an entry point; gives the environment in which Python finds it."""
    (folder / "shiny_losses.py").write_text(content)
    facts = folder / "shiny_losses-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: shiny-losses\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[mls.plugins]\nshiny = shiny_losses\n")
    return {"PYTHONPATH": str(folder)}


def test_an_installed_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    there = package(tmp_path, LOSS.format(name="shiny"))
    code = "from mls import losses; print(losses.build('shiny')); print('shiny' in losses.names())"
    done = python(code, **there)
    assert (done.returncode, done.stdout) == (0, "Mine(temperature=1.0, reduction=mean)\nTrue\n"), done.stderr


def test_a_broken_package_is_left_out_with_a_warning(tmp_path: Path) -> None:
    done = python("from mls import losses; print(len(losses.names()))", **package(tmp_path, "1 / 0"))
    assert (done.returncode, int(done.stdout)) == (0, len(losses.names()))
    assert "the plug-in shiny_losses of an installed package cannot be imported: division by zero" in done.stderr


# ---------------------------------------------------------------------------------------------- in a configuration


def test_a_recipe_names_a_file_beside_it(loss_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: mls_scenes_tiny\nrun: {plugins: [squared.py]}\nobjective: {loss: squared}\n")
    assert load_config(recipe).run.plugins == [str(loss_file)]
    above = tmp_path / "above.yaml"
    above.write_text(f"base: {recipe.stem}\n")
    assert load_config(above).run.plugins == [str(loss_file)]
    assert "squared" in losses.names()


def test_the_configuration_keeps_what_was_imported(loss_file: Path) -> None:
    assert load_config("mls_scenes_tiny").run.plugins == []
    plugins.load([str(loss_file)])
    resolved = resolve("mls_scenes_tiny")
    assert (resolved.config.run.plugins, resolved.origins["run.plugins"]) == ([str(loss_file)], "--import")


def test_an_override_replaces_what_a_stored_configuration_names(loss_file: Path, tmp_path: Path) -> None:
    config = load_config("mls_scenes_tiny", [f"run.plugins=[{loss_file}]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    moved = loss_file.rename(tmp_path / "moved.py")
    plugins._loaded.clear()  # as in another process
    del LOSSES["squared"]
    with pytest.raises(ConfigError, match=rf"there is no plug-in file {loss_file}: .*"):
        load_config(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", [f"run.plugins=[{moved}]"]).run.plugins == [str(moved)]


@pytest.mark.parametrize("value", ["5", "[5]", "{a: 1}"])
def test_what_is_no_list_of_names_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.plugins is .*: list files and modules, such as \[my_loss\.py\]"):
        load_config("mls_scenes_tiny", [f"run.plugins={value}"])


# ---------------------------------------------------------------------------------------------- with a run


def test_a_resume_imports_what_the_run_began_with(loss_file: Path, tiny: list[str], mls_command: Call) -> None:
    few = [*tiny, "run.name=mine", "optim.epochs=1", "objective.loss=squared"]
    begun = mls_command("pretrain", "mls_scenes_tiny", "--import", str(loss_file), *few, "engine.max_steps=5")
    assert begun.returncode == 0, begun.stderr
    (run,) = [Run(path.parent) for path in loss_file.parent.glob("runs/*/config.yaml")]
    assert not run.done
    (elsewhere := loss_file.parent / "elsewhere").mkdir()
    moved = loss_file.rename(elsewhere / loss_file.name)
    refused = mls_command("pretrain", "--resume", str(run.path))
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: there is no plug-in file {loss_file}: ")
    resumed = mls_command("pretrain", "--resume", str(run.path), "engine.max_steps=null", "--import", str(moved))
    assert resumed.returncode == 0, resumed.stderr
    assert f"importing the plug-in {moved}" in resumed.stderr
    assert run.done
    assert f"- {moved}\n" in (run.path / "config.yaml").read_text()


def test_a_misspelt_name_is_answered_with_the_plugins_name(loss_file: Path, tiny: list[str], mls_command: Call) -> None:
    done = mls_command("pretrain", "mls_scenes_tiny", "--import", str(loss_file), *tiny, "objective.loss=squarred")
    assert done.returncode == 2
    assert "unknown loss 'squarred': did you mean 'squared'?" in done.stderr


def test_the_backbone_of_a_run_is_known_by_its_plugin(tmp_path: Path, tiny: list[str]) -> None:
    file = tmp_path / "flat.py"
    file.write_text(BACKBONE)
    plugins.load([str(file)])
    config = load_config("mls_scenes_tiny", [*tiny, "model.backbone=flat", "optim.epochs=1"])
    run = mls.pretrain(config, quiet=True)
    done = python("import sys, mls; print(mls.load_backbone(sys.argv[1]).feature_dim)", str(run.path))
    assert (done.stdout, done.stderr) == ("12\n", f"importing the plug-in {file}\n")
    moved = (run.path / "backbone.safetensors").rename(tmp_path / "alone.safetensors")
    (run.path / "backbone.json").rename(moved.with_suffix(".json"))
    backbones.BACKBONES.pop("flat")  # as in another process
    with pytest.raises(ConfigError, match="unknown backbone 'flat'"):  # weights alone never run code
        mls.load_backbone(moved)


def test_no_plugin_is_imported_for_a_backbone_that_is_known(loss_file: Path, tiny: list[str]) -> None:
    plugins.load([str(loss_file)])
    run = mls.pretrain(load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1"]), quiet=True)
    loss_file.write_text("raise SystemExit('must not run')")
    done = python("import sys, mls; print(mls.load_backbone(sys.argv[1]).feature_dim)", str(run.path))
    assert (done.stdout, done.stderr) == ("128\n", "")
    assert "flat" not in backbones.names()
