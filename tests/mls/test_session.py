"""A session on a training of a few numbers: saving beside the step, by time and by step; failures; events."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mls.engine import checkpoint
from mls.engine.checkpoint import Checkpoints, Copied, HashingFile, snapshot
from mls.engine.session import Saving, Session
from mls.errors import CheckpointError, Stopped, UserError

CPU = torch.device("cpu")


class Counting:
    """Its state after step n is n everywhere."""

    def __init__(self, folder: Path | None, total: int = 6, **saving: Any) -> None:
        self.step, self.numbers = 0, torch.zeros(200_000)
        self.saving = folder and Saving(Checkpoints(folder, keep_last=2), folder / "events.jsonl", **saving)
        self.session = Session(self, total, self.saving, CPU)
        state = self.session.restore()
        if state is not None:
            self.step, self.numbers = state["step"], state["numbers"]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "numbers": self.numbers}

    def take_step(self) -> None:
        self.step += 1
        self.numbers += 1
        self.session.end_step()

    def train(self) -> None:
        with self.session.running(quiet=True):
            while self.step < self.session.total:
                self.take_step()


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


class Gate:
    """Holds every write of a checkpoint up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        write = HashingFile.write

        def waiting(file: HashingFile, data: memoryview) -> int:
            assert self.opened.wait(20)
            return write(file, data)

        monkeypatch.setattr(HashingFile, "write", waiting)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, training = Gate(monkeypatch), Counting(tmp_path, steps=2)
    with training.session.running(quiet=True):
        for _ in range(3):
            training.take_step()
        assert training.saving.checkpoints.steps() == []  # still being written
        gate.opened.set()
        training.session.writer.wait()
        state = training.saving.checkpoints.newest()
        assert state["step"] == 2 and bool((state["numbers"] == 2).all())
        assert bool((training.numbers == 3).all())


def test_a_second_save_waits_for_the_first_and_the_end_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, training = Gate(monkeypatch), Counting(tmp_path, total=5, steps=2)
    threading.Timer(0.5, gate.opened.set).start()
    with training.session.running(quiet=True):
        training.take_step()
        training.take_step()
        training.take_step()
        assert not gate.opened.is_set()
        training.take_step()
        assert gate.opened.is_set()
        assert 2 in training.saving.checkpoints.steps()
        training.take_step()
    assert training.saving.checkpoints.steps() == [4, 5]  # keep_last=2


@pytest.mark.parametrize(("saving", "steps"), [({"steps": 4}, [4, 8, 10]), ({"minutes": 0.0}, list(range(1, 11)))])
def test_saves_by_step_and_by_time(tmp_path: Path, saving: dict[str, Any], steps: list[int]) -> None:
    Counting(tmp_path, total=10, **saving).train()
    assert [row["step"] for row in events(tmp_path) if row["event"] == "save"] == steps


def test_the_time_between_two_saves_counts_from_the_last_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("mls.engine.session.time.monotonic", lambda: clock[0])
    training = Counting(tmp_path, total=55, minutes=10.0)
    with training.session.running(quiet=True):
        for _ in range(55):
            clock[0] += 60.0
            training.take_step()
            training.session.writer.wait()  # or the writing would seem to take minutes
    saved = [row["step"] for row in events(tmp_path) if row["event"] == "save"]
    assert saved == [10, 20, 30, 40, 50, 55]


def test_a_signal_saves_and_a_resume_goes_on_from_there(tmp_path: Path) -> None:
    first = Counting(tmp_path)
    with (
        pytest.raises(
            Stopped, match="stopped after step 2 of 6, everything is saved; the same call goes on"
        ) as stopped,
        first.session.running(quiet=True),
    ):
        first.take_step()
        os.kill(os.getpid(), signal.SIGTERM)
        first.take_step()
    assert stopped.value.exit_code == 75
    second = Counting(tmp_path)
    assert second.step == 2 and bool((second.numbers == 2).all())
    second.train()
    rows = events(tmp_path)
    assert [row["event"] for row in rows] == ["start", "save", "stop", "resume", "save", "stop"]
    assert [row.get("reason") for row in rows if row["event"] == "stop"] == ["SIGTERM", "finished"]
    assert {"time", "host", "pid", "world", "step"} <= set.intersection(*(set(row) for row in rows))
    assert rows[0]["versions"].keys() == {"mls", "torch", "python"}
    assert rows[1]["write_seconds"] >= 0 and rows[3]["step"] == 2


def test_without_a_folder_nothing_is_written_and_a_signal_stops_all_the_same() -> None:
    training = Counting(None)
    with pytest.raises(Stopped, match="nothing was to be saved"), training.session.running(quiet=True):
        os.kill(os.getpid(), signal.SIGTERM)
        training.take_step()


def test_an_error_of_the_loop_waits_for_the_writer_and_is_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, training = Gate(monkeypatch), Counting(tmp_path, steps=1)
    threading.Timer(0.3, gate.opened.set).start()
    with pytest.raises(ZeroDivisionError), training.session.running(quiet=True):
        training.take_step()
        _ = 1 / 0
    assert training.saving.checkpoints.newest()["step"] == 1
    assert events(tmp_path)[-1]["reason"] == "ZeroDivisionError: division by zero"


def test_a_folder_that_cannot_be_written_is_told_at_the_next_step(tmp_path: Path) -> None:
    training = Counting(tmp_path / "run", steps=1)
    (tmp_path / "run").write_text("a file, in which not even root makes another")
    with pytest.raises(UserError, match="cannot write .*run"), training.session.running(quiet=True):
        training.take_step()
        training.session.writer.wait()
        training.take_step()
    assert training.step == 2


def in_a_small_tmpfs(folder: Path, megabytes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with a file system of this size at `folder`, which only it and its children see."""
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount += [f'mount -t tmpfs -o size={megabytes}m none {folder} && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs (unshare --mount --map-root-user)")
    return subprocess.run([*mount, *command], capture_output=True, text=True, timeout=200)


FULL_DISK = """
import sys, threading, time
from pathlib import Path
import torch
from mls import distributed
from mls.engine.checkpoint import Checkpoints
from mls.engine.session import Saving, Session
from mls.errors import Stopped, UserError

folder = Path(sys.argv[1])
process = distributed.start("cpu")

class Growing:
    step = 0
    def state_dict(self):
        return {"step": self.step, "numbers": torch.full((200_000 * self.step,), 1.0 * self.step)}

training = Growing()
saving = Saving(Checkpoints(folder, 2), folder / "events.jsonl", steps=1)
session = Session(training, 100, saving, process.device)
try:
    with session.running(quiet=True):
        for training.step in range(1, 100):
            session.agree()
            session.end_step()
            session.writer.wait()  # so that the next step is the first that can know of a failure
except (UserError, Stopped) as error:
    # 0.8 and 1.6 MB are kept, 2.4 MB do not fit beside them into 4.
    sys.stdout.write(f"{process.rank} {type(error).__name__} {training.step} {error}\\n")  # whole, whoever else writes
if process.main:
    state = Checkpoints(folder, 2).newest()
    files = sorted(path.name for path in folder.iterdir())
    sys.stdout.write(f"newest {state['step']} {float(state['numbers'].mean())} {files}\\n")
distributed.barrier()
distributed.stop()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_told_at_the_next_step_on_all_ranks_and_what_was_saved_stays(
    processes: int, tmp_path: Path
) -> None:
    script, disk = tmp_path / "script.py", tmp_path / "disk"
    script.write_text(FULL_DISK)
    disk.mkdir()
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = in_a_small_tmpfs(disk, 4, *python, str(script), str(disk))
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines[0].startswith("0 UserError 4 no disk space left for") and "lower engine.keep_last" in lines[0]
    if processes == 2:
        assert lines[1] == "1 Stopped 4 rank 0 could not save"
    assert lines[-1] == "newest 2 2.0 ['events.jsonl', 'step-00000001.pt', 'step-00000002.pt']"


def test_a_failure_of_the_last_save_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *a, **k: real_open("/dev/full" if ".pt." in str(path) else path, *a, **k)
    )
    with pytest.raises(UserError, match="no disk space left for .*step-00000006.pt"):
        Counting(tmp_path).train()
    assert events(tmp_path)[-1]["reason"].startswith("UserError: no disk space left")


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_snapshot_keeps_values_kinds_and_layout_and_shares_nothing() -> None:
    module = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    state = {"module": module.state_dict(), "plain": [1, (2.5, None)], "row": torch.arange(10)[2:4]}
    copied = snapshot(state)
    assert copied["plain"] == [1, (2.5, None)]
    assert copied["module"]._metadata == state["module"]._metadata
    assert copied["module"]["weight"].stride() == module.weight.stride()
    assert copied["row"].untyped_storage().nbytes() == 16
    gathered = Copied(whole=torch.ones(3))
    assert snapshot(gathered)["whole"] is gathered["whole"] and type(snapshot(gathered)) is dict
    with torch.no_grad():
        module.weight.zero_()
    assert copied["module"]["weight"].abs().sum() > 0


def test_what_a_killed_writer_left_is_removed_by_the_next_session_alone(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.pt.1234.tmp").write_bytes(b"half")
    training = Counting(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # who only reads removes nothing
    training.train()
    assert not list(tmp_path.glob(".*"))


def test_kill_9_while_the_writer_writes_loses_only_that_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys, time
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from pathlib import Path
            from test_session import Counting
            from mls.engine.checkpoint import HashingFile
            training, write = Counting(Path({str(tmp_path / "run")!r}), total=4, steps=2), HashingFile.write

            def slow(file, data):
                done = write(file, data)
                file.flush()
                if "00000004" in file.file.name:
                    print("writing", flush=True)
                    time.sleep(60)
                return done

            HashingFile.write = slow
            training.train()
        """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.kill()
    assert list((tmp_path / "run").glob(".step-00000004.pt.*.tmp"))
    training = Counting(tmp_path / "run", total=4)
    assert training.step == 2 and bool((training.numbers == 2).all())
    training.train()
    assert bool((training.numbers == 4).all())
    assert [row["event"] for row in events(tmp_path / "run")] == ["start", "save", "resume", "save", "stop"]


def test_a_damaged_checkpoint_is_refused_by_its_hash(tmp_path: Path) -> None:
    Counting(tmp_path, total=1).train()
    (file,) = tmp_path.glob("step-*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its hash"):
        checkpoint.read(file)


def test_signals_reach_the_main_thread_while_it_waits_for_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C ends a run at once, also while its last checkpoint is being written."""
    gate, training = Gate(monkeypatch), Counting(tmp_path, total=1)

    def press_twice() -> None:
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press_twice)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), training.session.running(quiet=True):
        pressing.start()
        training.take_step()
        training.session.finish()
    assert not gate.opened.is_set() and time.monotonic() - began < 15
    gate.opened.set()
    pressing.join()
    training.session.writer.wait()
