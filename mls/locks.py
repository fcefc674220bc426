"""Only one process at a time: `with locked(folder / ".lock", f"{folder} is being trained"): ...` refuses, or waits for,
a second one, and never stands in the way of the living after its holder has died, however and wherever it died.

The lock file names its holder. A holder on this machine is judged by the system's lock (flock), which ends with the
process; where a file system has none, by the process' number and start. A holder on another machine of a shared file
system is judged by the file's time, which a thread renews every BEAT seconds: after STALE seconds of silence it is
taken for dead. An earlier start of the same SLURM job is dead. Who was taken for dead and is not learns it by `check`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO, Literal

from mls.errors import UserError
from mls.files import telling_disk_errors
from mls.signals import SIGNALS

BEAT = 20.0  # seconds between two signs of life
STALE = 120.0  # seconds of silence; longer than BEAT and a network file system's cached times (60 s) together
SETTLE = 2.0  # of two that take over from another machine at once, the later one stays: seconds until that is seen
GLANCE = 0.5  # who is refused has seen the holder for so long: it neither ends now nor is just being replaced


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says."""

    host: str = "an unknown machine"
    pid: int = 0
    since: str = "an unknown time"
    command: str = "an unknown command"
    machine: str = ""  # one boot of one kernel: hosts in containers may share a name
    started: str = ""  # the process' start, as numbers of processes are used again
    job: str = ""
    restart: str = ""  # of the job

    @classmethod
    def here(cls) -> Holder:
        job = "/".join(os.environ.get(name, "") for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID"))
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
            machine=_text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
            started=_start(os.getpid()),
            job="" if job.endswith("/") else job,
            restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
        )

    @classmethod
    def of(cls, file: BinaryIO) -> Holder:
        try:
            file.seek(0)
            stored = json.loads(file.read())
            return cls(**{field.name: stored[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError):  # of a crashed machine, or of version 0.1, whose locks were empty
            return cls()

    def __str__(self) -> str:
        command = self.command if len(self.command) <= 100 else f"{self.command[:97]}..."
        return f"process {self.pid} on {self.host} since {self.since} ({command})"


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, words: str, file: BinaryIO) -> None:
        self.path, self.words, self.file, self.pid = path, words, file, os.getpid()
        self._released = threading.Event()
        threading.Thread(target=self._beat, name=f"lock {path}", daemon=True).start()

    def check(self) -> None:
        """To be asked before something is written that the next holder would miss or meet."""
        with telling_disk_errors(self.path):
            if _is_at(self.file, self.path):
                return
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            raise UserError(f"{self.words} by another by now, {Holder.of(file)}: this process stops")
        raise UserError(f"{self.path} was deleted while {self.words}: this process stops, as another may have begun")

    def release(self) -> None:
        self._released.set()
        if os.getpid() == self.pid and _is_at(self.file, self.path):  # a fork does not release its parent's
            self.path.unlink(missing_ok=True)
        _close(self.file)

    def _beat(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they are for the main thread
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError, ValueError):  # the next one may succeed; a closed file is released
                os.utime(self.file.fileno())


@contextlib.contextmanager
def locked(path: Path, words: str, wait: bool = False) -> Iterator[Lock]:
    """Hold the lock file `path`, whose folder is there. `words` say what its holder does ("RUN is being trained").
    Where another process holds it: wait until it does not, or refuse, in one sentence that names it."""
    with telling_disk_errors(path, "free some"):
        while (file := _Claim(path, words, wait).attempt()) is None:
            pass
    lock = Lock(path, words, file)
    try:
        yield lock
    finally:
        lock.release()


def holder(path: Path) -> Holder | None:
    """Who holds a lock, for who only wants to know; None where nobody alive does. Nothing is touched."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        found, me = Holder.of(file), Holder.here()
        if found.machine == me.machine and found.started.partition(" ")[0] == me.started.partition(" ")[0]:
            return found if _start(found.pid) == found.started else None
        return found if time.time() - os.fstat(file.fileno()).st_mtime < STALE else None
    return None


class _Claim:
    """A wish for a lock: an own file, which takes the lock's place as soon as nobody alive is there."""

    def __init__(self, path: Path, words: str, wait: bool) -> None:
        self.path, self.words, self.wait, self.said = path, words, wait, ""
        self.me = Holder.here()
        self.own = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        self.mine = open(self.own, "x+b")  # noqa: SIM115 (open as long as the lock is held)
        _HELD.add(self.mine)

    def attempt(self) -> BinaryIO | None:
        """The file in the lock's place; None where another process took the place at the same time."""
        placed = False
        try:
            with contextlib.suppress(OSError):  # not every file system has such locks
                fcntl.flock(self.mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.mine.write(json.dumps(asdict(self.me)).encode())
            self.mine.flush()
            placed = self.take()
        finally:
            self.own.unlink(missing_ok=True)
            if not placed:
                _close(self.mine)
        if not placed:
            return None
        for rest in self.path.parent.glob(f"{self.path.name}.*.tmp"):
            with contextlib.suppress(OSError), open(rest, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its process was killed just here, or begins anew
                rest.unlink()
        return self.mine

    def take(self) -> bool:
        watch = _Watch()
        while True:
            try:
                os.link(self.own, self.path)
                return True
            except FileExistsError:
                if _is_at(self.mine, self.path):  # a network file system may repeat a request that it has granted
                    return True
            except FileNotFoundError:  # the own file was taken for a dead process'
                return False
            except OSError:  # a file system without links
                if not self.path.exists():
                    return self.replace(settle=True)
            try:
                theirs = open(self.path, "r+b")  # noqa: SIM115 (closed below)
            except FileNotFoundError:
                continue
            with theirs:
                holder, state = Holder.of(theirs), self.state(theirs, watch)
                if state in ("dead", "silent") and _is_at(theirs, self.path):
                    return self.replace(settle=state == "silent")
            self.wait_for(holder, state, watch)

    def state(self, theirs: BinaryIO, watch: _Watch) -> Literal["alive", "dead", "silent", "unsure"]:
        """ "dead" is certain; "silent" is taken for dead, and others may find so at the same time."""
        holder, time_of_last_beat = Holder.of(theirs), watch.look(theirs)
        if holder.job and holder.job == self.me.job and holder.restart != self.me.restart:
            return "dead"
        if holder.machine in ("", self.me.machine):
            try:
                fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process has taken the place
                return "dead"
            except BlockingIOError:
                return "alive"
            except OSError:
                namespace = self.me.started.partition(" ")[0]
                if namespace and holder.started.startswith(f"{namespace} "):  # else the number says nothing here
                    return "alive" if _start(holder.pid) == holder.started else "silent"
        if watch.moved:
            return "alive"
        # Both times are the file system's: the clocks of two machines are never compared.
        return "silent" if max(self.now() - time_of_last_beat, watch.seconds) > STALE else "unsure"

    def replace(self, settle: bool) -> bool:
        try:
            os.replace(self.own, self.path)
        except FileNotFoundError:
            return False
        time.sleep(SETTLE if settle else 0)
        return _is_at(self.mine, self.path)

    def wait_for(self, holder: Holder, state: str, watch: _Watch) -> None:
        text = ""
        if state == "unsure":
            text = f"{self.words} by {holder}: waiting up to {STALE:.0f} s for a sign that it is alive"
        elif state == "alive" and watch.seconds >= GLANCE:
            if not self.wait:
                raise UserError(f"{self.words} by {holder}: wait until it has ended, or end it")
            text = f"{self.words} by {holder}: waiting until it has ended"
        if text and text != self.said:
            print(text, file=sys.stderr, flush=True)
        self.said = text or self.said
        time.sleep(min(0.05 + watch.seconds / 10, 1.0))

    def now(self) -> float:
        """The file system's time."""
        os.utime(self.mine.fileno())
        return os.fstat(self.mine.fileno()).st_mtime


class _Watch:
    """What was seen of one holder since the first look at it."""

    file, first, began, moved = -1, 0.0, 0.0, False

    def look(self, file: BinaryIO) -> float:
        """The time of its last sign of life."""
        stat = os.fstat(file.fileno())
        if self.file != stat.st_ino:
            self.file, self.first, self.began, self.moved = stat.st_ino, stat.st_mtime, time.monotonic(), False
        self.moved |= self.first != stat.st_mtime
        return stat.st_mtime

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


_HELD: set[BinaryIO] = set()


def _close(file: BinaryIO) -> None:
    _HELD.discard(file)
    file.close()


def _close_in_child() -> None:
    """A fork, such as a data worker, would hold the system's lock on after its parent's death."""
    while _HELD:
        _HELD.pop().close()


os.register_at_fork(after_in_child=_close_in_child)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return False


def _start(pid: int) -> str:
    """Which process has this number: the namespace that numbers it, and when it started. "" where there is none."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    with contextlib.suppress(OSError):
        return f"{os.readlink(f'/proc/{pid}/ns/pid')} {fields[19]}"
    return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
