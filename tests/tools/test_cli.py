"""The command line as a user sees it: help, exit codes, one sentence for a mistake. What the commands do is tested
elsewhere, each where it lives."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.main

import mls
from mls.engine import Run
from mls.errors import UserError
from mls.recipes import recipes
from mls.tables import markdown_table
from mls.tools.cli import app, print_in_any_encoding

Call = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = ("torch", "numpy", "sklearn", "matplotlib", "omegaconf", "PIL", "jinja2")
MISTAKES = {  # command: the sentence that it brings
    "config mls_scenes_tiny objective.kk=5": r"unknown key 'objective\.kk' .*: did you mean 'objective\.k'\?",
    "config objective.k=5": r"name the configuration before the overrides: `mls config CONFIG objective\.k=5`",
    "config --diff mls_scenes_tiny": r"--diff compares exactly two: `mls config --diff A B`",
    "pretrain": rf"say what to train: .* one of {', '.join(recipes())}",
    "pretrain objective.k=5": rf"say what to train: .* one of {', '.join(recipes())}",
    "pretrain mls_scenes_tin": r"unknown recipe 'mls_scenes_tin': did you mean 'mls_scenes_tiny'\? .*",
    "pretrain mls_folder_r50": r"no images were named: set data\.root=FOLDER .*",
    "report nowhere": r"nowhere is not a run folder .*: give the folder that a run printed",
    "data check nowhere": r"data\.root .*nowhere does not exist: .*",
    "data pack . packed --source folders": r"unknown data\.source 'folders': did you mean 'folder'\? .*",
    "scenes export --layout cocoo --out scenes": r"unknown layout 'cocoo': did you mean 'coco'\? .*",
}


def commands(group: typer.main.TyperGroup | None = None, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command: ("demo",), ("scenes", "export") and so on."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


def test_help_lists_every_command_with_a_line_about_it(mls_command: Call) -> None:
    done = mls_command("--help")
    assert done.returncode == 0
    for name in {words[0] for words in commands()}:
        assert re.search(rf"^\W*{name} +[A-Z]", done.stdout, re.MULTILINE), f"{name} is not listed"
    assert mls_command().stdout.split() == done.stdout.split()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_every_help_and_table_can_be_printed_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
    print_in_any_encoding()
    for words in [(), *commands()] if encoding == "ascii" else [(), ("demo",)]:  # the fewest characters
        with pytest.raises(SystemExit) as end:
            app([*words, "--help"])
        assert not end.value.code, words
    print(markdown_table(["mean ± std", "a – b"], [["53.0 ± 0.8", "2 × 2 → λ…☃"]]))
    sys.stdout.flush()
    assert ("53.0 +- 0.8" if encoding == "ascii" else "53.0 ± 0.8").encode(encoding) in written.getvalue()


def test_the_front_door_imports_nothing_heavy() -> None:
    code = f"import json, sys, mls.tools.cli; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_checkout_that_hides_the_package_is_one_sentence(tmp_path: Path) -> None:
    """`git clone …/mls`, an editable install, and torchrun from the folder of the clone."""
    (tmp_path / "mls").mkdir()
    (tmp_path / "mls" / "tools").symlink_to(Path(mls.__file__).parents[1] / "tools")
    command = [sys.executable, "-m", "mls.tools", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if "EditableFinder" in str(sys.meta_path):  # an installed package is found before a folder that is none
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: the folder mls here hides the installed package: call this from another")
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.stdout == f"mls {mls.__version__}\n"


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_the_help_of_a_command_shows_how_to_call_it(words: tuple[str, ...], mls_command: Call) -> None:
    done = mls_command(*words, "--help")
    assert done.returncode == 0, done.stderr
    _, found, examples = " ".join(done.stdout.split()).partition("Example")
    assert found
    assert f"mls {' '.join(words)} " in examples


def test_config_says_where_every_value_comes_from(mls_command: Call) -> None:
    done = mls_command("config", "mls_scenes_tiny", "objective.k=5")
    assert done.returncode == 0, done.stderr
    lines = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert re.fullmatch(r"objective\.k: 5 +# override", lines["objective.k"])
    assert re.fullmatch(r"run\.seed: 0 +# default", lines["run.seed"])
    number = int(re.fullmatch(r"data\.source: scenes +# mls_scenes_tiny\.yaml:(\d+)", lines["data.source"])[1])
    recipe = Path(mls.__file__).parents[1] / "configs" / "pretrain" / "mls_scenes_tiny.yaml"
    assert recipe.read_text().splitlines()[number - 1] == "  source: scenes"


def test_config_tells_how_two_recipes_or_runs_differ(mls_command: Call, tmp_path: Path) -> None:
    changes = ["objective.k=7", "run.recipe=mls_scenes_tiny", f"run.root={tmp_path}", "run.name=other"]
    run = Run.create(mls.load_config("mls_scenes_tiny", changes))
    before = mls.load_config("mls_scenes_tiny").objective.k
    done = mls_command("config", "--diff", "mls_scenes_tiny", str(run.path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "run.name: null -> other",
        f"run.root: null -> {tmp_path}",
        f"objective.k: {before} -> 7",
    ]
    same = mls_command("config", "--diff", str(run.path), str(run.path))
    assert (same.returncode, same.stdout) == (0, "no differences\n")


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments: str, mls_command: Call, tmp_path: Path) -> None:
    done = mls_command(*arguments.split(), MLS_RUNS=str(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(f"error: {MISTAKES[arguments]}\n", done.stderr)
    assert done.stdout == ""


def test_a_word_that_is_no_command_is_told_with_the_nearest_one(mls_command: Call) -> None:
    done = mls_command("pretrian")
    assert done.returncode == 2
    assert "Did you mean 'pretrain'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_is_gone_is_no_traceback(unbuffered: str, mls_command_line: Callable[..., list[str]]) -> None:
    gone, pipe = os.pipe()
    os.close(gone)  # as `mls config mls_scenes_tiny | head -1`, when head is the quicker one
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = mls_command_line("config", "mls_scenes_tiny")
    try:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    finally:
        os.close(pipe)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_run_is_found_by_its_name_where_a_folder_is_called_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "tests").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    made = Run.create(mls.load_config("mls_scenes_tiny", [f"run.root={tmp_path / 'runs'}", "run.name=tests"]))
    with pytest.raises(UserError, match="tests is not a run folder"):
        Run.open("tests")
    monkeypatch.setenv("MLS_RUNS", str(tmp_path / "runs"))
    assert Run.open("tests").path == made.path
    nearer = Run.create(mls.load_config("mls_scenes_tiny", ["run.root=.", "run.name=nearer"]))
    Run.create(mls.load_config("mls_scenes_tiny", [f"run.root={tmp_path / 'runs'}", "run.name=nearer"]))
    assert Run.open("nearer").path == nearer.path
