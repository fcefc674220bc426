"""Training a run: `pretrain(config)`, `resume(run)`, and `run(run_folder)` for launchers. torch is loaded when a run is
trained: commands that only read run folders do not wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mls.config import Config, to_yaml
from mls.engine.run import Run, run_folder
from mls.errors import UserError
from mls.files import write_atomically
from mls.recipes import load_config

if TYPE_CHECKING:
    from mls.engine.trainer import Trainer

__all__ = ["Run", "Trainer", "finish", "pretrain", "resume", "run"]


def pretrain(config: Config, quiet: bool = False) -> Run:
    """Train from scratch in a new run folder. Under torchrun every process calls this."""
    from mls import distributed
    from mls.engine.trainer import Trainer

    process = distributed.start(config.engine.device, config.engine.timeout_minutes)
    # Only rank 0 makes the folder; a mistake there must reach the others as well, or they would wait for ever.
    created = Run(Path(distributed.on_main(lambda: str(Run.create(config).path))))
    try:
        trainer = Trainer(config, created, process, quiet=quiet)
    except UserError:
        if process.main:  # nothing was trained: leave no folder behind that is no run
            (created.path / "config.yaml").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                created.path.rmdir()
        raise
    trainer.train()
    return created


def resume(folder: str | Path | Run, overrides: Sequence[str] = (), quiet: bool = False) -> Run:
    """Resume from a run's last checkpoint. Overrides may change only what does not change the result."""
    path = folder.path if isinstance(folder, Run) else Run.open(folder).path
    if overrides:
        from mls import distributed
        from mls.engine.trainer import Trainer

        config = load_config(path / "config.yaml", overrides)
        distributed.start(config.engine.device, config.engine.timeout_minutes)
        Trainer.check_resume(config, Run(path))
        distributed.on_main(lambda: write_atomically(path / "config.yaml", to_yaml(config).encode()))
        distributed.barrier()
    return run(path, quiet=quiet)


def run(folder: str | Path, quiet: bool = False) -> Run:
    """Train the run in `folder` to its end: from scratch, or from its last checkpoint. What a launcher calls.

    A finished run returns at once. Raises `mls.errors.Stopped` after a signal, when everything is saved.
    """
    opened = Run.open(folder)
    if opened.done:
        return opened
    from mls import distributed
    from mls.engine.trainer import Trainer

    config = opened.config
    process = distributed.start(config.engine.device, config.engine.timeout_minutes)
    Trainer(config, opened, process, quiet=quiet).train()
    return opened


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
