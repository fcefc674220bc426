"""One process at a time: who is alive is told from who is dead, on this machine, on another one, and by the job."""

import errno
import fcntl
import json
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from mls import locks
from mls.errors import UserError
from mls.locks import Holder, locked


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 0.1, "STALE": 0.6, "SETTLE": 0.02, "GLANCE": 0.05}.items():
        monkeypatch.setattr(locks, name, seconds)


def left_behind(path: Path, **facts: object) -> None:
    """The file of a holder that is gone."""
    path.write_text(json.dumps({**asdict(Holder.here()), "pid": 2**22 + 1, **facts}))


def dead_process() -> int:
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    refused = pytest.raises(UserError, match=f"^runs/a is being trained by process {os.getpid()} on .* since 2.*: wait")
    with locked(path, "runs/a is being trained"), refused, locked(path, "runs/a is being trained"):
        pass
    assert not list(tmp_path.iterdir())


def test_or_waits_until_the_first_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, order = tmp_path / ".lock", []

    def second() -> None:
        with locked(path, "a pack is being written", wait=True):
            order.append("second")

    with locked(path, "a pack is being written"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert capsys.readouterr().err.count("waiting until it has ended") == 1


@pytest.mark.parametrize("with_a_worker", [False, True])
def test_a_killed_holder_is_followed_at_once_though_its_workers_live_on(tmp_path: Path, with_a_worker: bool) -> None:
    path, (read, write) = tmp_path / ".lock", os.pipe()
    if not (holder := os.fork()):
        with locked(path, "held"):
            worker = os.fork() if with_a_worker else 1
            if worker:
                os.write(write, b"%d" % worker)
            time.sleep(60)
    worker = int(os.read(read, 100))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    began = time.monotonic()
    with locked(path, "held"):
        assert time.monotonic() - began < 0.5
    if with_a_worker:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("content", [b"", b"\0\0", b"{}", b'{"host": "a"}'])
def test_a_torn_file_belongs_to_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path / ".lock", "held"):
        pass


def test_without_locks_of_the_system_a_process_is_known_by_its_number_and_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / ".lock"
    left_behind(path, pid=dead_process())
    with locked(path, "held"):
        pass
    namespace = Holder.here().started.split()[0]
    left_behind(path, pid=os.getpid(), started=f"{namespace} 1")  # another process had this number
    with locked(path, "held"), pytest.raises(UserError, match="held by process"), locked(path, "held"):
        pass


def test_a_silent_holder_on_another_machine_is_waited_for_and_then_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ".lock"
    left_behind(path, machine="another", host="node7")
    began = time.monotonic()
    with locked(path, "held") as lock:
        assert 0.5 < time.monotonic() - began < 5
        lock.check()
    assert "on node7" in (said := capsys.readouterr().err) and said.count("\n") == 1
    left_behind(path, machine="another")
    os.utime(path, (time.time() - 5, time.time() - 5))
    began = time.monotonic()
    with locked(path, "held"):
        assert time.monotonic() - began < 0.5


def test_a_living_holder_on_another_machine_is_not_followed_and_whoever_was_is_told(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "held") as lock:
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "machine": "another"}))  # seen from elsewhere, it goes on beating
        with pytest.raises(UserError, match="held by process"), locked(path, "held"):
            pass
        lock.check()
        path.unlink()
        left_behind(path, host="node8")
        with pytest.raises(UserError, match="held by another by now, process .* on node8"):
            lock.check()
    assert path.exists()  # it is another's


def test_a_job_that_was_queued_again_follows_its_earlier_start_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    left_behind(tmp_path / ".lock", machine="another")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with locked(tmp_path / ".lock", "held"):
        assert time.monotonic() - began < 0.5


def test_what_a_process_left_that_was_killed_while_it_claimed_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".lock.0123.tmp"
    left.write_text("")
    with locked(tmp_path / ".lock", "held"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "none" / ".lock", "held"):
        pass
