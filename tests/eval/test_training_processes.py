"""The supervised loop in several processes: what one would learn, since each works out the whole batch's loss."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mls import distributed
from mls.eval import load_protocol
from mls.eval.images import shares
from mls.eval.protocol import Supervised
from mls.eval.supervised import prepare_training, run

Command = Callable[..., subprocess.CompletedProcess[str]]
# 75 images in batches of 16: the last batch has 11, which two processes cannot share evenly.
SMALL = """data.scenes.count=94 data.scenes.test_count=33 training.epochs=2 training.batch_size=16
training.batch_norm=frozen training.optimizer=sgd training.lr=0.01""".split()
LOSSES = {
    "an": [],
    "two_way": [],  # compares a class' images with one another
    "ll_cp": [],  # writes labels
    "role": [],  # learns a label for every image
    "em_apl": ["training.pseudo_from=1"],  # gives pseudo-labels by the scores of all images
    "em": ["training.linear_epochs=1"],
    "co_teaching": [],  # trains two networks
}
EACH = """
import sys, torch
from mls import distributed
from mls.eval import load_protocol
from mls.eval.supervised import run
for protocol, out in zip(sys.argv[1::2], sys.argv[2::2]):
    found = run(load_protocol(protocol), "random", 0, None, quiet=True)
    if distributed.rank() == 1:
        torch.save([found.weights, found.values], out)
distributed.stop()
"""


def protocol(loss: str) -> Supervised:
    return load_protocol("spml_scenes", [*SMALL, f"training.loss={loss}", *LOSSES[loss]])


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory, mls_command: Command) -> Path:
    """What the second of two processes has after training with each loss."""
    from mls.eval.protocol import to_yaml

    folder = tmp_path_factory.mktemp("two")
    (folder / "each.py").write_text(EACH)
    arguments = []
    for loss in LOSSES:
        (folder / f"{loss}.yaml").write_text(to_yaml(protocol(loss)))
        arguments += [str(folder / f"{loss}.yaml"), str(folder / f"{loss}.pt")]
    done = mls_command(*arguments, script=folder / "each.py", processes=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_learn_what_one_does(loss: str, by_two: Path) -> None:
    untrained = {
        name: tensor.clone() for name, tensor in prepare_training(protocol(loss), "random", 0, None).weights().items()
    }
    one = run(protocol(loss), "random", 0, None, quiet=True)
    weights, values = torch.load(by_two / f"{loss}.pt")
    assert one.weights.keys() == weights.keys()
    for name, tensor in one.weights.items():
        moved = (tensor - untrained[name]).double().norm()
        assert (weights[name] - tensor).double().norm() <= 0.005 * moved, name
    assert values == pytest.approx(one.values, abs=0.02)


def test_rows_are_dealt_in_blocks_that_cover_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 4)
    dealt = shares(torch.arange(10, 16))
    assert dealt.shape == (4, 2)
    assert dealt.flatten()[:6].tolist() == list(range(10, 16))


def test_the_command_tells_its_numbers_once(tmp_path: Path, mls_command: Command) -> None:
    done = mls_command("eval", "run", "spml_scenes", *SMALL, "--out", str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scenes/map ") == 1


def test_frozen_features_are_for_one_process(tmp_path: Path, mls_command: Command) -> None:
    done = mls_command("eval", "run", "knn_scenes", "--weights", "random", "--out", str(tmp_path), processes=2)
    assert "task knn runs in one process: start it without torchrun" in done.stderr
