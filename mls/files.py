"""Writing so that nothing is ever half there: a temporary name, fsync, rename. A full disk is one clear sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mls.errors import REFUSED, ConfigError, DataError, UserError, os_error, reason

if TYPE_CHECKING:
    from PIL.Image import Image

# What to do about a full disk.
AGAIN = "free some, and run the same command again"
CHECKPOINTS_FULL = "free some, or lower engine.keep_last; what was saved before is whole, and "
CHECKPOINTS_FULL += "`mls pretrain --resume` goes on from there"


# What to do about errors of the system that a user can cause.


@contextmanager
def atomic_file(path: Path, disk_full: str = AGAIN) -> Iterator[BinaryIO]:
    """Open `path` for writing; it appears, whole, when the block ends without an error. `disk_full` says what to do
    where there is no space left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with telling_disk_errors(path, disk_full):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def telling_disk_errors(path: Path, disk_full: str = AGAIN) -> Iterator[None]:
    """What goes wrong while `path` is written becomes one sentence."""
    try:
        yield
    except UserError:  # says already what went wrong, and may have met an error of the system on the way
        raise
    except BaseException as error:
        reason = os_error(error)
        if reason is not None:
            raise UserError(_sentence(path, reason, disk_full)) from error
        raise


def write_atomically(path: Path, data: bytes, disk_full: str = AGAIN) -> None:
    with atomic_file(path, disk_full) as file:
        file.write(data)


def remove_unfinished(folder: Path, *names: str) -> None:
    """Delete what processes that were killed while they wrote files of these names (`*` is any text) have left. Only
    for who alone writes there."""
    for rest in (rest for name in names for rest in folder.glob(f".{name}.*.tmp")):
        rest.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


CHECK = "check"
_IN_ORDER = json.JSONEncoder(sort_keys=True)  # `json.dumps` makes one for each record


def checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of plain values with a check of its own, a hash of all its other fields, as its last field.

    >>> checked({"value": 0.5})
    {'value': 0.5, 'check': '863c69ab5bb5'}
    """
    fields = {key: value for key, value in record.items() if key != CHECK}
    return fields | {CHECK: hashlib.sha256(_IN_ORDER.encode(fields).encode()).hexdigest()[:12]}


def changed(record: Mapping[str, Any]) -> bool:
    """Whether a record is not the one that was written. Of one without a check, as version 0.1 wrote it, nobody
    knows."""
    return CHECK in record and record[CHECK] != checked(record)[CHECK]


def read_json(path: Path, advice: str, error: type[UserError] = DataError, most: int = 1 << 40) -> Any:
    """What stands in a file that anybody may have written; `advice` says what to do where it cannot be read. A file of
    more than `most` bytes is none that was meant."""
    try:
        if path.stat().st_size > most:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError, MemoryError) as wrong:
        raise error(f"{path} cannot be read as JSON ({reason(wrong)}): {advice}") from None


def demand_pyarrow(file: Path) -> None:
    """Before anything is computed for a .parquet file."""
    if file.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError(f'{file} needs pyarrow: pip install "mls[parquet]", or choose another format')


def runs_folder() -> Path:
    """Where runs and results go: $MLS_RUNS, else ./runs."""
    return Path(os.environ.get("MLS_RUNS") or "runs").expanduser()


def place_for(name: str, out: Path | None, run: str | Path | None = None) -> Path:
    """Where a command writes `name`: `out`, else the folder of the run that it is about, else $MLS_RUNS. The current
    folder only where it is asked for."""
    about = Path(run).expanduser() if run is not None else None
    usual = about if about is not None and (about / "config.yaml").is_file() else runs_folder()
    place = usual / name if out is None else out.expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def check_picture(path: Path) -> None:
    """Before anything is computed for it."""
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"{path} names no format of a picture: choose another name that ends in .png or .jpg")


def save_picture(image: Image, path: Path) -> None:
    """In the format of its suffix."""
    check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        image.save(file, PICTURES[path.suffix.lower()])


def cache_folder(kind: str) -> Path:
    """Where what can be made again is kept: $MLS_CACHE/KIND, by default in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("MLS_CACHE") or os.path.join(home, "mls")) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot keep {kind} in {folder} ({error.strerror}): set MLS_CACHE to a folder") from None
    return folder


def slug(name: str) -> str:
    """A name that may become a file's.

    >>> slug("MLS, oracle pseudo-labels")
    'MLS-oracle-pseudo-labels'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")


def file_name(name: str, what: str) -> str:
    """A name of the user's that becomes one file or folder. Any other could lead out of its folder, hide there, or be
    taken for an option.

    >>> file_name("run-1", "run.name")
    'run-1'
    """
    parted = "/" in name or name[:1] in ("", ".", "-")
    if parted or not name.isprintable() or len(name.encode(errors="surrogateescape")) > 200:
        raise ConfigError(
            f"{what} is {name[:80]!r}: give one name of at most 200 bytes, without / and control characters, that "
            "starts with neither . nor -"
        )
    return name


def _sentence(path: Path, error: OSError, disk_full: str) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        advice = f"; {REFUSED[error.errno]}" if error.errno in REFUSED else ""
        return f"cannot write {path}: {error.strerror or error}{advice}"
    return f"no disk space left for {path}: {disk_full}"
