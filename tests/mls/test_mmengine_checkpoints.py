"""mmengine's own checkpoints are read back with torch's safety on, and whatever asks for more is refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mls.errors import CheckpointError
from mls.frameworks import installed as frameworks

if frameworks.missing("mmseg"):
    pytest.skip('mmsegmentation is not installed: pip install "mls[mmseg]"', allow_module_level=True)


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index))


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., Any]:
    """A Runner of mmengine with its own checkpoints, log and learning rate."""
    with frameworks.quiet():
        frameworks.load("mmseg")
        from mmengine.model import BaseModel
        from mmengine.runner import Runner

        from mls.frameworks import mmengine_checkpoints

    class Line(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(2, 1)

        def forward(self, inputs: torch.Tensor, mode: str = "loss") -> dict[str, torch.Tensor]:
            return {"loss": self.line(inputs).square().mean()}

        def train_step(self, data: torch.Tensor, optim_wrapper: Any) -> dict[str, torch.Tensor]:
            loss = self.forward(data)["loss"]
            optim_wrapper.update_params(loss)
            return {"loss": loss.detach()}

    def build(steps: int, **options: Any) -> Any:
        return Runner(
            Line(),
            str(tmp_path),
            torch.utils.data.DataLoader(Numbers(), 4),
            train_cfg={"type": "IterBasedTrainLoop", "max_iters": steps},
            optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            param_scheduler=[{"type": "PolyLR", "begin": 0, "end": 4, "by_epoch": False}],
            default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2}},
            randomness={"seed": 0},
            experiment_name=f"{tmp_path.name} {steps} {len(options)}",
            **options,
        )

    assert mmengine_checkpoints.read
    return build


def test_mmengine_resumes_its_own_checkpoint_with_all_that_is_in_it(runner: Callable[..., Any], tmp_path: Path) -> None:
    with frameworks.quiet():
        whole = runner(4)
        whole.train()
        file = tmp_path / "iter_2.pth"
        with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer|getattr|numpy"):
            torch.load(file)  # what torch's safety says without this
        rest = runner(4, resume=True, load_from=str(file))
        rest.train()
    assert rest.iter == 4
    ours, theirs = rest.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logged, expected = (one.message_hub.get_scalar("train/lr") for one in (rest, whole))
    assert np.array_equal(logged.data[0], expected.data[0])
    assert logged.mean() == expected.mean()
    with frameworks.quiet():  # and what it writes then can be read again
        assert runner(4, resume=True, load_from=str(tmp_path / "iter_4.pth")).train() is not None


class Hostile:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


@pytest.mark.parametrize("inside", ["message_hub", "meta"])
@pytest.mark.parametrize("kind", ["a command", "a way to one"])
def test_a_file_that_would_run_code_is_refused(
    runner: Callable[..., Any], tmp_path: Path, inside: str, kind: str
) -> None:
    from mmengine.logging import HistoryBuffer

    mark = tmp_path / "mark"
    attack = Hostile(os.mkdir, str(mark)) if kind == "a command" else Hostile(getattr, HistoryBuffer, "__init__")
    torch.save({"state_dict": {}, inside: {"x": attack}}, tmp_path / "hostile.pth")
    with frameworks.quiet(), pytest.raises(CheckpointError, match="asks for .* such a file can run any code"):
        runner(4, resume=True, load_from=str(tmp_path / "hostile.pth")).train()
    assert not mark.exists()


def test_torchs_own_reading_is_as_before_afterwards(runner: Callable[..., Any], tmp_path: Path) -> None:
    with frameworks.quiet():
        runner(2).train()
        from mls.frameworks.mmengine_checkpoints import read

        before = set(torch.serialization.get_safe_globals())  # kept in a set, listed in another order each time
        assert read(str(tmp_path / "iter_2.pth"))["meta"]["iter"] == 2
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_torn_file_is_one_sentence(tmp_path: Path) -> None:
    from mls.frameworks.mmengine_checkpoints import read

    torch.save({"state_dict": {}}, tmp_path / "torn.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "torn.pth").read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"torn.pth cannot be read"):
        read(str(tmp_path / "torn.pth"))
