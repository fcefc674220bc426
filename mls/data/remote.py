"""Downloads shards from a URL (http, https, s3 and the other protocols of fsspec) into a local folder, once for all
processes of a machine. Reading them is in tar.py."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mls.data.listing import printable, show
from mls.data.tar import MANIFEST
from mls.data.tarindex import IndexingBar
from mls.errors import DataError, unknown_name
from mls.files import cache_folder, sha256, write_atomically
from mls.locks import locked

TRIES = 5
FIRST_PAUSE = 1.0  # seconds before the second try; doubled before each further one
TIMEOUT = 30.0  # seconds without a byte until a try has failed
PACKAGES = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
REFUSED = (401, 403, 404, 410)  # HTTP status codes after which another try does not help

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Refused(Exception):
    """The server refused: another try does not help."""


def download(urls: list[str]) -> list[Path]:
    """Local copies of the shards, in the order of `urls`.

    An existing copy is used without contacting the server, unless a manifest of `mls data pack` beside the shards has
    another checksum for it.
    """
    files = _file_system(urls[0])
    bar = IndexingBar(text="downloading shards")
    paths = []
    checksums: dict[Path, dict[str, str]] = {}
    try:
        for number, url in enumerate(urls):
            name = urlsplit(url).path.rpartition("/")[2]
            if not name.endswith(".tar"):
                raise DataError(f"{_show(url)} does not end in .tar: name the shards, as in URL/shard-{{000..012}}.tar")
            folder = _folder(url)
            if folder not in checksums:
                checksums[folder] = _checksums(files, url, folder)
            paths.append(_copy(files, url, folder / name, checksums[folder].get(name)))
            bar.report(number + 1, len(urls))
    finally:
        bar.close()
    return paths


def _file_system(url: str) -> Any:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        if protocol not in ("http", "https"):
            return fsspec.filesystem(protocol)
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        return fsspec.filesystem(protocol, client_kwargs={"timeout": limits})
    except ImportError:
        package = PACKAGES.get(protocol, f"fsspec[{protocol}]")
        raise DataError(
            f'data.root {_show(url)} needs a package that is not installed: pip install "{package}"'
        ) from None
    except ValueError:
        raise unknown_name("protocol", protocol, fsspec.available_protocols(), DataError) from None


def _folder(url: str) -> Path:
    """A local folder for each remote one: shards keep their names, and their index is written beside them."""
    name = hashlib.blake2b(_show(url).rpartition("/")[0].encode(), digest_size=8).hexdigest()
    folder = cache_folder("shards") / name
    folder.mkdir(exist_ok=True)
    return folder


def _checksums(files: Any, url: str, folder: Path) -> dict[str, str]:
    """By shard name, from the manifest beside the shards, or from its last copy; empty without a manifest."""
    copy = folder / MANIFEST
    try:
        found = _with_retries(files.cat_file, url.partition("?")[0].rpartition("/")[0] + "/" + MANIFEST, tries=2)
        checksums = _by_name(found)
        write_atomically(copy, found)
        return checksums
    except Refused:
        return {}
    except DataError as error:
        log.warning("%s; going on with what is in %s", error, show(folder))
        return _by_name(copy.read_bytes()) if copy.is_file() else {}


def _by_name(manifest: bytes) -> dict[str, str]:
    try:
        return {str(name): str(record["sha256"]) for name, record in json.loads(manifest)["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # another program's manifest.json


def _copy(files: Any, url: str, path: Path, checksum: str | None) -> Path:
    """The local copy. One process downloads it while the others wait."""
    digest_file = path.with_name(f".{path.name}.sha256")
    with locked(path.with_name(f".{path.name}.lock"), f"{_show(url)} is being downloaded", wait=True):
        if path.is_file() and digest_file.is_file() and checksum in (None, digest_file.read_text()):
            return path
        part = path.with_name(f".{path.name}.part")
        try:
            digest = _with_retries(lambda url: _download(files, url, part, checksum), url)
            os.replace(part, path)
            write_atomically(digest_file, digest.encode())
        except Refused as error:
            raise DataError(f"{_show(url)} cannot be had ({error}): check the address and your permission") from None
        finally:
            part.unlink(missing_ok=True)
    return path


def _download(files: Any, url: str, part: Path, checksum: str | None) -> str:
    files.get_file(url, str(part))
    expected, size = files.info(url).get("size"), part.stat().st_size
    if expected is not None and size != expected:
        raise ConnectionError(f"{size} of {expected} bytes came")
    digest = sha256(part)
    if checksum not in (None, digest):
        raise ConnectionError("the checksum is not that of the manifest")
    return digest


def _with_retries(fetch: Callable[[str], Result], url: str, tries: int = TRIES) -> Result:
    """Call `fetch` until it succeeds, with a doubled pause before each further try."""
    for number in range(1, tries + 1):
        try:
            return fetch(url)
        except Exception as error:  # every protocol has its own
            if isinstance(error, (FileNotFoundError, PermissionError)) or getattr(error, "status", 0) in REFUSED:
                raise Refused(_reason(error, url)) from error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"no disk space left for a copy of {_show(url)}: free some, or set MLS_CACHE to another folder"
                ) from None
            reason = _reason(error, url)
        if number < tries:
            pause = FIRST_PAUSE * 2 ** (number - 1)
            log.warning("%s did not come (%s): trying again in %g seconds", _show(url), reason, pause)
            time.sleep(pause)
    raise DataError(f"{_show(url)} did not come in {tries} tries (last: {reason}): check the server and start again")


def _reason(error: Exception, url: str) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return f"HTTP {status}"
    if isinstance(error, FileNotFoundError):
        return "not found"
    text = str(error).replace(url, _show(url)).strip().split("\n")[0]
    return text or type(error).__name__


def _show(url: str) -> str:
    """The address without passwords and signatures."""
    parts = urlsplit(url)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return printable(os.fsencode(address))
