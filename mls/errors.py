"""The errors a user can cause. Each message is one sentence that says what was wrong and what to do about it."""

import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

EXIT_MISTAKE = 2  # the user's mistake: one sentence, no traceback
EXIT_LOST = 1  # another process of the run is gone
EXIT_SAVED = 75  # a signal came: everything is saved, `--resume` goes on
EXIT_INTERRUPTED = 130  # Ctrl-C: saved too, unless pressed twice


class UserError(Exception):
    """Something the user can put right. Shown without a traceback; the command exits with code 2."""


class ConfigError(UserError):
    """A configuration that cannot work: unknown key, wrong type, impossible combination."""


class DataError(UserError):
    """A data set that is missing, empty, too small or too broken."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another configuration."""


class DivergedError(UserError):
    """Training produced non-finite values too often in a row."""


class LaunchError(UserError):
    """A scheduler that is not there, or that refuses a job."""


class Stopped(Exception):
    """A signal asked the run to stop and everything is saved. Not an error; `exit_code` says which signal it was, or
    that another process is gone (EXIT_LOST, already told)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: BaseException) -> str:
    """What an error of another program says, in one line: for an OSError without the path that its text repeats, and
    without torch's advice to load with weights_only=False, which runs what is in the file.

    >>> reason(RuntimeError("Weights only load failed. Re-run with weights_only=False\\n\\nUnsupported operand 149"))
    'Unsupported operand 149'
    >>> reason(EOFError())
    'EOFError'
    """
    text = getattr(error, "strerror", None) or str(error)
    lines = (line.strip() for line in text.rpartition("WeightsUnpickler error:")[2].splitlines())
    said = [line for line in lines if line and "weights_only" not in line and "Weights only" not in line]
    return said[0] if said else type(error).__name__


def refusal(path: Path, error: BaseException) -> str:
    """The sentence for a file of tensors that its reader did not read."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted is None:
        return f"{path} cannot be read: {reason(error)[:200]}"
    return (
        f"{path} asks for {wanted[1]} while it is read, and such a file can run any code, so it was not read: "
        "where you trust it, save its state_dict alone with torch.save, and give that file"
    )


def command(text: str, *words: object) -> str:
    """A command that a sentence proposes, with words that may hold anything: it can be pasted into a shell.

    >>> command("mls pretrain --resume", "runs/first try")
    "`mls pretrain --resume 'runs/first try'`"
    """
    return f"`{text} {shlex.join(map(str, words))}`"


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[UserError] = ConfigError) -> UserError:
    """The error for a name that is not in a registry, with the nearest valid name.

    >>> print(unknown_name("loss", "bcee", ["bce", "softmax"]))
    unknown loss 'bcee': did you mean 'bce'? (known: bce, softmax)
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return error(f"unknown {kind} '{name}': {hint}(known: {', '.join(known)})")
