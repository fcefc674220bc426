"""The errors a user can cause. Each message is one sentence that says what was wrong and what to do about it."""

import errno
import os
import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

EXIT_MISTAKE = 2  # the user's mistake: one sentence, no traceback
EXIT_LOST = 1  # another process of the run is gone
EXIT_SAVED = 75  # a signal came: everything is saved, `--resume` goes on
EXIT_INTERRUPTED = 130  # Ctrl-C: saved too, unless pressed twice


EXHAUSTED = (
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "Storage size calculation overflowed",
    "Invalid buffer size",
)
REFUSED = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, and start the same command again")
REFUSED |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or name another folder")
REFUSED |= dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "a file is in the way, so name another folder")
REFUSED |= dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN), "see whether its disk is whole and mounted")


class UserError(Exception):
    """Something the user can put right. Shown without a traceback; the command exits with code 2. What a message quotes
    of a user's text never breaks the line, moves the cursor or fills the screen."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class ConfigError(UserError):
    """A configuration that cannot work: unknown key, wrong type, impossible combination."""


class MissingLibrary(ConfigError):
    """It asks for a library that comes along only where it is asked for."""


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


def one_line(text: str, most: int = 2000) -> str:
    """A text that may quote anything, as a terminal can show it.

    >>> one_line("unknown key 'a\\x1b[2J\\nb'")
    "unknown key 'a\\\\x1b[2J b'"
    """
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= most else f"{line[: most - most // 4]} … {line[-(most // 4) :]}"


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
    return said[0] if said else "it holds more than tensors" if text else type(error).__name__


GO_ON = "what was saved is whole, and the same command, or `--resume`, goes on"


def lost_worker(error: Exception) -> UserError:
    words = "a data worker was ended from outside, mostly because memory ran out: lower data.workers"
    return UserError(f"{words} ({reason(error)[:150]}); {GO_ON}")


def os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind an error: torch.save and safetensors hide a full disk behind one of their own."""
    while error is not None and not isinstance(error, OSError):
        if of_rust := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(of_rust[1]), os.strerror(int(of_rust[1])))
        error = error.__cause__ or error.__context__
    return error


def of_the_machine(error: BaseException) -> UserError | None:
    """The sentence for what a machine does to a process: memory that ran out, a data worker that was ended, another
    rank that is gone, a disk that is full or lost. None for anything else, which is a fault of the program."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in EXHAUSTED):
        wanted = re.search(r"tried to allocate [\d.]+ \w+", text, re.IGNORECASE)
        smaller = "data.batch_size, data.workers, dictionary.size or the images' size"
        return UserError(f"there is not enough memory{f' ({wanted[0]})' if wanted else ''}: lower {smaller}; {GO_ON}")
    if isinstance(error, RuntimeError) and "deterministic implementation" in text:
        return UserError(f"{reason(error)[:150]}: set engine.deterministic=false")
    if isinstance(error, RuntimeError) and "DataLoader worker" in text and "Caught " not in text:
        return lost_worker(error)
    if isinstance(error, RuntimeError) and ("gloo" in text or type(error).__name__.startswith("Dist")):
        return UserError(f"another process is gone or does not answer (its own last words say why); {GO_ON}")
    of_system = os_error(error) if isinstance(error, OSError | RuntimeError) else None
    advice = None if of_system is None else REFUSED.get(of_system.errno or 0)
    if of_system is None or advice is None:
        return None
    return UserError(f"{of_system.filename or 'a file'} cannot be written or read ({of_system.strerror}): {advice}")


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
