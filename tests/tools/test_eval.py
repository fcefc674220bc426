"""`mls eval` as a user calls it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., subprocess.CompletedProcess[str]]
FEW = ["data.scenes.count=80", "data.scenes.test_count=32", "training.epochs=2"]


def test_run_prints_and_stores_the_numbers(mls_command: Command, tmp_path: Path) -> None:
    done = mls_command("eval", "run", "spml_scenes", *FEW, "training.loss=em", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| scenes/map " in done.stdout
    assert "epoch 2/2" in done.stderr
    again = mls_command("eval", "run", "spml_scenes", *FEW, "training.loss=em", "--out", str(tmp_path))
    lines = again.stdout.splitlines()
    (says,) = [line for line in lines if "not run again; --again runs it" in line]
    assert [line for line in lines if line != says] == done.stdout.splitlines()
    assert "epoch" not in again.stderr  # it was not run again


def test_suite_prints_our_rows_beside_the_papers(mls_command: Command, tmp_path: Path) -> None:
    arguments = ["eval", "suite", "paper_hml_noise", "--tiny", "--seeds", "2", "--out", str(tmp_path), *FEW]
    done = mls_command(*arguments)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "paper_hml_noise-tiny.md").read_text()
    assert table in done.stdout
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert "±" in lines["HML"] and lines["HML"].rstrip(" |").endswith("73.5")


def test_suite_without_any_data_ends_in_one_sentence(mls_command: Command, tmp_path: Path) -> None:
    done = mls_command("eval", "suite", "paper_hml_noise", "--out", str(tmp_path), MLS_DATA=str(tmp_path))
    assert done.returncode == 2
    assert "coco2014 is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_names_protocols_suites_data_sets_and_losses(mls_command: Command) -> None:
    done = mls_command("eval", "list")
    assert done.returncode == 0, done.stderr
    for name in ("spml_voc2012", "paper_two_way", "wider_attribute", "em_apl"):
        assert f"  {name}\n" in done.stdout
    keys = mls_command("eval", "list", "spml_cub")
    assert "alpha: 0.01" in keys.stdout


def test_a_mistyped_protocol_is_answered_with_the_nearest(mls_command: Command) -> None:
    done = mls_command("eval", "run", "spml_scene")
    assert done.returncode == 2
    assert "did you mean 'spml_scenes'" in done.stderr


def test_check_says_what_is_there_and_what_is_missing(mls_command: Command, tmp_path: Path) -> None:
    done = mls_command("eval", "check", "scenes", "vaw", MLS_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "  yes  scenes: 10 classes, 6000 train, 2000 test\n" in done.stdout
    assert f"  no   vaw: {tmp_path / 'vaw'} is missing" in done.stdout
    assert mls_command("eval", "check", "scene").returncode == 2
