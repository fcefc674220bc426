"""What a user of several processes sees on the terminal, and that their gradients are those of plain training."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

Call = Callable[..., subprocess.CompletedProcess[str]]


def test_torchrun_prints_no_warning(tiny: list[str], mls_command: Call) -> None:
    few = [*tiny, "optim.epochs=1", "optim.warmup_epochs=0", "objective.in_batch_negatives=true"]
    done = mls_command("pretrain", "mls_scenes_tiny", *few, processes=2, PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert "on 2 × cpu" in done.stderr
    assert [line for line in done.stderr.splitlines() if re.search(r"Warning:|\bwarning\b", line)] == []


CHECKPOINTED = """
import sys, torch
from mls import distributed
from mls.core import methods
from mls.data import Views
from mls.engine.trainer import averaging_gradients
from mls.recipes import load_config

def step(checkpointing, method, *keys):
    keys = [f"objective.method={method}", f"engine.checkpointing={checkpointing}", "data.batch_size=4", *keys]
    parallel = averaging_gradients(methods.build(load_config("mls_scenes_tiny", keys)))
    torch.manual_seed(distributed.rank())  # each process has its own images, and leaves out its own branches
    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    loss = parallel(Views(images, [torch.zeros(4, 4)] * 2, torch.arange(4))).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in parallel.parameters() if p.grad is not None), *parallel.buffers()]

distributed.start("cpu")
with open(sys.argv[1] + str(distributed.rank()), "w") as file:
    for keys in (["moco_v3", "model.backbone=vit_tiny", "model.drop_path=0.5", "objective.hidden=32"], ["simsiam"]):
        plain, twice = step("false", *keys), step("true", *keys)
        same = [torch.equal(one, other) for one, other in zip(plain, twice, strict=True)]
        print(len(same), all(same), float(plain[0]), float(plain[1].double().sum()), file=file)
distributed.stop()
"""


def test_two_processes_have_the_same_loss_and_gradients_with_checkpointing(tmp_path: Path, mls_command: Call) -> None:
    (tmp_path / "step.py").write_text(CHECKPOINTED)
    done = mls_command(str(tmp_path / "rank"), script=tmp_path / "step.py", processes=2)
    assert done.returncode == 0, done.stderr
    ranks = [[line.split() for line in (tmp_path / f"rank{rank}").read_text().splitlines()] for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert int(first[0]) > 20 and first[1] == second[1] == "True"
        assert first[2] != second[2] and first[3] == second[3]  # other images, one gradient
