"""Training a run: `pretrain(config)`, `resume(run)`, `branch(run, step)`, and `run(run_folder)` for launchers. torch is
loaded when a run is trained: commands that only read run folders do not wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mls.config import Config, to_yaml
from mls.engine.run import Run, run_folder
from mls.files import remove_unfinished, write_atomically
from mls.locks import Lock, locked
from mls.recipes import load_config

if TYPE_CHECKING:
    from mls.distributed import Process
    from mls.engine.trainer import Trainer

__all__ = ["Run", "Trainer", "branch", "finish", "pretrain", "resume", "run"]
WRITTEN = ("config.yaml", "metrics.jsonl", "backbone.*", "DONE")  # of which killed writers may leave unfinished files


def pretrain(config: Config, quiet: bool = False) -> Run:
    """Train from scratch in a new run folder. Under torchrun every process calls this."""
    return _train_new(config, quiet, Run.create)


def branch(folder: str | Path | Run, step: int, overrides: Sequence[str] = (), quiet: bool = False) -> Run:
    """Train a new run from a step of another one, with overrides that may change the result: `run.name` (by default
    the other's name and the step) is its name. Its folder holds both configurations."""
    from mls.engine.branch import create_branch

    parent = folder if isinstance(folder, Run) else Run.open(folder)
    config = load_config(parent.path / "config.yaml", overrides)
    return _train_new(config, quiet, lambda sized: create_branch(parent, step, overrides, sized))


def _train_new(config: Config, quiet: bool, create: Callable[[Config], Run]) -> Run:
    from mls import distributed
    from mls.engine.trainer import Trainer

    process = distributed.start(config.engine.device, config.engine.timeout_minutes)
    config = _sized(config, process, quiet)
    # Only rank 0 makes the folder; a mistake there must reach the others as well, or they would wait for ever.
    created = Run(Path(distributed.on_main(lambda: str(create(config).path))))
    if process.main:  # of a branch it has another name
        config = created.config
    with _alone(created) as lock:
        try:
            trainer = Trainer(config, created, process, quiet, lock)
        except BaseException:  # Ctrl-C and a lack of memory too
            if process.main:  # nothing was trained: leave no folder behind that is no run
                created.remove()
            raise
        trainer.train()
    return created


def resume(
    folder: str | Path | Run, overrides: Sequence[str] = (), quiet: bool = False, accept_data: bool = False
) -> Run:
    """Resume from a run's last checkpoint. Overrides may change only what does not change the result. Where images came
    or went, `accept_data` maps their numbers by name; else they are refused."""
    opened = folder if isinstance(folder, Run) else Run.open(folder)
    if opened.done and not overrides:
        return opened
    from mls import distributed
    from mls.engine.trainer import Trainer

    config = load_config(opened.path / "config.yaml", overrides)
    process = distributed.start(config.engine.device, config.engine.timeout_minutes)
    with _alone(opened) as lock:

        def prepare() -> bool:
            opened.refuse_lost_checkpoints()
            return opened.done

        config = _sized(config, process, quiet)
        done = distributed.on_main(prepare)
        # It refuses a configuration that changes the result, before that is written.
        trainer = Trainer(config, opened, process, quiet, lock, accept_data)
        if (overrides or opened.config.run.auto) and process.main:  # a job's run is sized on the machine that trains it
            write_atomically(opened.path / "config.yaml", to_yaml(config).encode())
        if not done:
            trainer.train()
    return opened


def _sized(config: Config, process: Process, quiet: bool) -> Config:
    from mls.engine import sizing

    return sizing.sized(config, process, (lambda *_: None) if quiet else sizing.show)


def run(folder: str | Path, quiet: bool = False) -> Run:
    """Train the run in `folder` to its end: from scratch, or from its last checkpoint. What a launcher calls.

    A finished run returns at once. Raises `mls.errors.Stopped` after a signal, when everything is saved.
    """
    return resume(folder, quiet=quiet)


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[Lock | None]:
    """No other process trains this run. Rank 0 holds the lock; where it is refused, all are."""
    from mls import distributed

    held: list[Lock] = []
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            held.append(stack.enter_context(locked(run.path / ".lock", f"{run.path} is being trained")))
            remove_unfinished(run.path, *WRITTEN)
            remove_unfinished(run.path / "moments", "step-*.json")

        distributed.on_main(enter)
        yield held[0] if held else None


def finish(config: Config, quiet: bool = False) -> Run:
    """The finished run of a configuration with a name: trained now, resumed, or found finished in its folder."""
    assert config.run.name is not None
    folder = run_folder(config)
    return run(folder, quiet) if (folder / "config.yaml").is_file() else pretrain(config, quiet)


def __getattr__(name: str) -> object:
    if name == "Trainer":
        from mls.engine.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'mls.engine' has no attribute '{name}'")
