"""`mls bench objectives` as a user runs it, on a few scenes."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mls.core import losses
from mls.recipes import load_config
from mls.results import Results
from mls.tools.bench.objectives import NONE, TWINS, chosen

Command = Callable[..., "subprocess.CompletedProcess[str]"]
FEW = [
    "monitor.log_every=2",
    "data.scenes.count=256",
    "data.scenes.test_count=200",
    "data.batch_size=64",
    "dictionary.size=128",
]


def numbers(table: str) -> dict[str, list[str]]:
    """What the table says, by loss; the last column is a time and another one in every run."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.long
def test_objectives_compare_losses_in_one_table_and_go_on_where_they_stopped(
    tmp_path: Path, mls_command: Command
) -> None:
    command = ["bench", "objectives", "--short", "--seeds", "1", "--loss", "em", "--loss", "two_way"]
    command += ["--out", str(tmp_path), "mls_scenes_tiny", *FEW, "optim.epochs=1", "engine.threads=1"]
    first = mls_command(*command)
    assert first.returncode == 0, first.stderr
    table = numbers(first.stdout)
    assert list(table) == [NONE, "bce", "em", "two_way"]
    assert table["bce"][-1] == "1.00"
    assert all(0 < float(cells[0]) < 100 and float(cells[-1]) > 0 for cells in table.values())
    assert table[NONE][2] == ""  # no multi-label term, no pseudo-labels
    assert 0 < float(table["em"][2]) < 1
    assert (tmp_path / "objectives.md").read_text() in first.stdout
    assert {row["weights"] for row in Results(tmp_path / "results.jsonl").rows()} == set(table)

    again = mls_command(*command)
    assert again.returncode == 0, again.stderr
    assert "— em" not in again.stderr
    assert {name: cells[:-1] for name, cells in numbers(again.stdout).items()} == {
        name: cells[:-1] for name, cells in table.items()
    }


def test_every_loss_that_labels_rows_is_in_the_study_once_and_as_its_recipe_says() -> None:
    rows = chosen()
    assert {NONE, "bce", "em", "hml", "two_way", "asl"} <= set(rows)
    supervised = {name for name in losses.names() if losses.LOSSES[name].only_supervised}
    assert supervised == {"role", "crisp", "curriculum", "vlpl", "co_teaching", "jocor"}
    assert not {"an", *supervised} & set(rows)
    assert {NONE, *supervised, *rows, *TWINS} == {NONE, "bce", *losses.names()}
    for name, changes in rows.items():
        objective = load_config("mls_scenes_tiny", changes).objective
        if name in ("em", "ll_r", "hml", "two_way", "asl", "softmax"):
            assert objective == load_config(f"{name}_scenes_tiny").objective


@pytest.mark.parametrize("name", TWINS)
def test_a_loss_left_out_of_the_study_equals_its_twin(name: str) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.zeros(4, 30).scatter_(1, logits.topk(5).indices, 1.0)
    values = [losses.build(loss)(logits, labels) for loss in (name, TWINS[name])]
    gradients = [torch.autograd.grad(value, logits)[0] for value in values]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_mistakes_are_one_sentence(tmp_path: Path, mls_command: Command) -> None:
    mistakes = {
        "--loss emm": "unknown loss 'emm': did you mean 'em'",
        "--loss role": "objective.loss=role learns from the labels of every image",
        "optim.epochs=1": "name the recipe before the overrides: `mls bench objectives mls_scenes_tiny optim.epochs=1`",
    }
    for arguments, sentence in mistakes.items():
        done = mls_command("bench", "objectives", *arguments.split(), "--out", str(tmp_path))
        assert done.returncode == 2
        assert re.fullmatch(r"error: .*\n", done.stderr)
        assert sentence in done.stderr
