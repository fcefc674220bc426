"""What a person sees while a run trains, looked at on a terminal emulator."""

import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console

import mls
from mls.engine.trainer import last_words
from mls.errors import Stopped
from mls.progress import TrainingProgress, for_people

PLACE = re.compile(r" \d+/24  eta (-:--|\d+:\d\d)")
SHORT = """data.scenes.count=96 data.scenes.test_count=32 data.batch_size=8 dictionary.size=32 objective.k=5
objective.warmup_epochs=1 optim.epochs=2 monitor.log_every=2 monitor.knn_images=32 monitor.knn_every_epochs=1
model.projection=16 engine.threads=1 monitor.moments=0""".split()  # 12 steps an epoch


class Terminal(io.StringIO):
    """Keeps all that is written, a frame at a time."""

    encoding = "utf-8"

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.screen = pyte.Screen(columns, 30)
        self.stream = pyte.Stream(self.screen)
        self.frames: list[list[str]] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.stream.feed(text.replace("\n", "\r\n"))
        self.frames.append([line.rstrip() for line in self.screen.display])
        return len(text)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_run_shows_step_and_time_left_in_every_frame_and_one_bar_after_ctrl_c(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"COLUMNS": columns, "LINES": 30, "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, str(value))
    terminal, step = Terminal(columns), TrainingProgress.step
    monkeypatch.setattr("sys.stderr", terminal)

    def interrupted(self: TrainingProgress, number: int) -> None:
        if number == 20 and not Path(tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            terminal.write("^C")  # as a terminal shows it
            os.kill(os.getpid(), signal.SIGINT)
        step(self, number)

    monkeypatch.setattr(TrainingProgress, "step", interrupted)
    name = "run-with-a-name-of-quite-some-length"
    config = mls.load_config("mls_scenes_tiny", [*SHORT, f"run.name={name}", f"run.root={tmp_path}"])
    with pytest.raises(Stopped):
        mls.pretrain(config)
    first = next(number for number, frame in enumerate(terminal.frames) if any(map(PLACE.search, frame)))
    assert all(sum(bool(PLACE.search(line)) for line in frame) == 1 for frame in terminal.frames[first:])
    known = [any(line.startswith("epoch") and "info_nce" in line for line in frame) for frame in terminal.frames]
    assert all(known[known.index(True) :])
    assert next(line.split("  ")[:2] for line in terminal.frames[-1] if "kNN mAP" in line) == ["epoch 1", "step 12"]


@pytest.mark.parametrize(("columns", "chance"), [(80, False), (160, True)])
def test_where_columns_are_few_chance_goes_before_a_term_does(columns: int, chance: bool) -> None:
    progress = TrainingProgress(total=24, start=0, title="run", show=False)
    values = {"loss/info_nce": 4.35, "chance/info_nce": 7.69, "loss/windows": 2.4, "chance/windows": 5.55}
    progress.epoch, progress.numbers = 6, for_people({**values, "loss/words": 4.73, "chance/words": 4.81})
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(progress)
    told = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert all(term in told for term in ("info_nce 4.350", "windows 2.400", "words 4.730"))
    assert ("(chance 4.81)" in told) == chance


def test_the_last_words_give_numbers_and_commands_to_paste(synthetic_run: Callable[..., Any]) -> None:
    run = synthetic_run("my run", row=lambda step: {"monitoring": 0.004, "knn/map": step / 10})
    words = last_words(run, first=1, last=8, seconds=61)
    assert words[0] == "finished 8 steps in 1:01, 1.0% of the time waiting for data, 0.4% measuring for the log"
    assert "| multi_label | 0.600 | 0.600 | 0.650     |" in words[2] and "| kNN mAP     | 0.100 | 0.800 |" in words[2]
    assert f"  mls report '{run.path}'" in words and f"  mls eval run linear_scenes --weights '{run.path}'" in words
