"""A private, real SLURM on one machine: slurmctld, a slurmd for each pretended node, munged. For tests and rehearsals.
No root, no systemd, nothing under /etc; all of it listens on 127.0.0.1 and lives in one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mls.errors import LaunchError, command
from mls.slurm.box import processes, settings
from mls.slurm.box.settings import Settings

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where Debian puts daemons
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
_STARTED: list[subprocess.Popen[bytes]] = []  # Python warns if a running process has no reference
TIMEOUT = 120  # seconds until the nodes must be up; it takes two on an idle machine


@dataclass(frozen=True)
class Box:
    """A SLURM that runs, or ran, in `folder`."""

    folder: Path

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """The environment in which SLURM's commands use this SLURM and no other."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**inherited, "SLURM_CONF": str(self.conf), "PATH": PATH}

    def run_command(self, *command: str) -> str:
        """What one of SLURM's commands prints; empty where it fails."""
        try:
            done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=30)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout.strip()

    def pids(self) -> dict[str, int]:
        """The daemons by name: munged, slurmctld, slurmd:NODE."""
        try:
            rows = (self.folder / "pids").read_text().split("\n")
        except FileNotFoundError:
            return {}
        return {name: int(pid) for name, _, pid in (row.partition(" ") for row in rows) if pid}

    def start_daemon(self, name: str, *command: str) -> None:
        log = open(self.folder / "log" / f"{name}.out", "ab")  # noqa: SIM115 (the daemon keeps it)
        process = subprocess.Popen(
            command,
            env=self.environment(),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.close()
        _STARTED.append(process)
        pids = self.pids() | {name: process.pid}
        (self.folder / "pids").write_text("".join(f"{known} {pid}\n" for known, pid in pids.items()))

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        self.start_daemon(f"slurmd:{node}", "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As if this node lost its power. `start_node` starts it again."""
        processes.kill_node(node, self.pids()[f"slurmd:{node}"], self.folder, self.conf)


def missing() -> list[str]:
    """The programs of SLURM that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def start(folder: str | Path, config: Settings = Settings()) -> Box:  # noqa: B008 (it is frozen)
    """Start a box in `folder`; returns when its nodes take jobs (about two seconds)."""
    if missing():
        raise LaunchError(f"SLURM is not installed here ({', '.join(missing())} not found): {INSTALL}")
    box = Box(Path(folder).expanduser().resolve())
    if box.pids():
        raise LaunchError(
            f"there is a box in {box.folder} already: use it, or {command('mls slurm box stop', box.folder)} first"
        )
    _prepare(box, config)
    run, munge = box.folder / "run", box.folder / "munge"
    munged = ["munged", "--foreground", "--num-threads=2", "--force", f"--key-file={munge}/key"]
    munged += [f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid", f"--seed-file={munge}/seed"]
    try:
        box.start_daemon("munged", *munged, f"--log-file={box.folder}/log/munged.log")
        _wait(box, lambda: (run / "munge.sock").exists(), "munged does not open its socket")
        box.start_daemon("slurmctld", "slurmctld", "-D", "-i", "-c")
        for node in settings.node_names(config.nodes):
            box.start_node(node)
        _wait(box, lambda: _idle(box) == config.nodes, "the nodes do not come up")
    except BaseException:
        stop(box.folder)
        raise
    return box


def stop(folder: str | Path, delete: bool = False) -> bool:
    """End a box: its jobs, its daemons and their remaining processes. False where none ran."""
    box = Box(Path(folder).expanduser().resolve())
    pids = box.pids()
    if pids:
        if processes.alive(pids.get("slurmctld", 0)):
            box.run_command("scancel", "--full", "--signal=KILL", f"--user={os.getuid()}")
            box.run_command("scancel", f"--user={os.getuid()}")
        processes.end(pids.values())
        processes.kill_left_over(box.folder, box.conf)
        (box.folder / "pids").unlink()
        for process in _STARTED:
            process.poll()
    if delete:
        shutil.rmtree(box.folder, ignore_errors=True)
    return bool(pids)


def _prepare(box: Box, config: Settings) -> None:
    for name in ("state", "spool", "log", "run", "dev", "munge"):
        shutil.rmtree(box.folder / name, ignore_errors=True)  # of an earlier box here
        (box.folder / name).mkdir(parents=True)
    box.folder.chmod(0o755)  # munge refuses sockets and keys that others could have written
    (box.folder / "munge").chmod(0o700)
    key = box.folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for number in range(config.gpus):
        (box.folder / "dev" / f"gpu{number}").symlink_to("/dev/null")  # SLURM wants a device behind a GPU
    settings.write(box.folder, config)


def _idle(box: Box) -> int:
    return box.run_command("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split().count("idle")


def _wait(box: Box, ready: Callable[[], bool], complaint: str) -> None:
    until = time.monotonic() + TIMEOUT
    while not ready():
        ended = [name for name, pid in box.pids().items() if not processes.alive(pid)]
        if ended or time.monotonic() > until:
            why = f"{', '.join(ended)} ended" if ended else f"{complaint} within {TIMEOUT} s"
            raise LaunchError(
                f"the box in {box.folder} does not start, {why}: {_last_line(box, ended)}; start it again"
            )
        time.sleep(0.05)


def _last_line(box: Box, ended: list[str]) -> str:
    for name in [*ended, "slurmctld"]:
        lines = (box.folder / "log" / f"{name}.out").read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    return f"see {box.folder}/log"
