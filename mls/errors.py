"""The errors a user can cause. Each message is one sentence that says what was wrong and what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches

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
    """The message of an exception, for an OSError without the path that its text repeats."""
    return getattr(error, "strerror", None) or str(error)


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[UserError] = ConfigError) -> UserError:
    """The error for a name that is not in a registry, with the nearest valid name.

    >>> print(unknown_name("loss", "bcee", ["bce", "softmax"]))
    unknown loss 'bcee': did you mean 'bce'? (known: bce, softmax)
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return error(f"unknown {kind} '{name}': {hint}(known: {', '.join(known)})")
