"""The files in examples/, each called as its own docstring says, on less data."""

import ast
import doctest
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mls
from mls import exporting, losses, plugins
from mls.tools.cli import app

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("my_*.py"))
FEW = {  # overrides of a command's first words
    "mls pretrain": ["--name", "run"],
    "mls eval run knn_scenes": ["data.scenes.count=200", "data.scenes.test_count=50"],
    "mls eval run spml_scenes": ["data.scenes.count=200", "data.scenes.test_count=50", "training.epochs=1"],
    "mls export": [],
}


def commands(example: Path) -> list[str]:
    """The commands in an example's docstring, without the remarks behind them."""
    lines = (ast.get_docstring(ast.parse(example.read_text())) or "").splitlines()
    return [line.partition("   ")[0] for line in lines if line.startswith("mls ")]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_reads_alone(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 60
    assert commands(example)
    imported = [
        node.module or "" for node in ast.walk(ast.parse(example.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    assert not [name for name in imported if name.startswith(("examples", "tests"))]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_its_docstring_says(
    example: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries_as_before: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLS_RUNS", raising=False)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    few = [*tiny, "optim.epochs=1"]
    if not commands(example)[0].startswith("mls pretrain"):
        mls.pretrain(mls.load_config("mls_scenes_tiny", [*few, "run.name=run"]), quiet=True)
    for command in commands(example):
        (less,) = [FEW[words] for words in FEW if command.startswith(words)]
        if command.startswith("mls pretrain"):
            own = "objective.method=" in command  # keys of mls are not its keys
            less = [*(one for one in few if not (own and one.startswith("objective."))), *less]
        words = shlex.split(command.replace("runs/mls_scenes_tiny-…", "runs/run"))
        assert app([*words[1:], *less], standalone_mode=False) in (None, 0)


def test_the_architecture_page_calls_each_example_as_its_docstring_does() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert len(EXAMPLES) == 5
    assert all(f"`{commands(example)[0]}`" in page for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_doctests_of_an_example_pass(example: Path, registries_as_before: None) -> None:
    plugins.load([str(example)])
    assert doctest.testmod(sys.modules[example.stem]).failed == 0


def test_the_example_of_a_loss_is_what_its_formula_says(registries_as_before: None) -> None:
    plugins.load([str(ROOT / "examples" / "my_loss.py")])
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1, 0, -1]])
    plain = losses.build("an", reduction="none")(logits, labels)
    assert torch.allclose(losses.build("poly1", epsilon=0.0, reduction="none")(logits, labels), plain)
    away = torch.tensor([[1 - 0.880797, 0.268941, 0.622459]])  # 1 - sigmoid(2), sigmoid(-1), sigmoid(0.5)
    more = losses.build("poly1", epsilon=2.0, reduction="none")(logits, labels) - plain
    assert torch.allclose(more, 2 * away, atol=1e-5)


@pytest.mark.long
def test_the_exported_program_runs_without_mls(tmp_path: Path, tiny: list[str], registries_as_before: None) -> None:
    plugins.load([str(ROOT / "examples" / "my_export_target.py")])
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1"]), quiet=True)
    (checked,) = exporting.export(run.path, ["program"], tmp_path / "out")
    assert checked.worst == 0
    code = """if True:
        import sys, torch
        sys.modules["mls"] = None  # cannot be imported
        import use_program
        torch.manual_seed(0)
        images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
        torch.save(use_program.features(images).detach(), "features.pt")
        """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True, timeout=300)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    card = mls.load_backbone(run.path).card
    mean, std = (torch.tensor(card[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = mls.load_backbone(run.path)((images / 255 - mean) / std)
    assert torch.allclose(torch.load(tmp_path / "out" / "features.pt"), wanted, atol=1e-5)
