"""A process that kills itself right after its n-th change of the file system: after each write, flush to the disk,
rename, deletion and new folder in turn."""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from typing import Any

CHANGES = ("fsync", "replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir", "truncate", "ftruncate", "utime")


class Points:
    """How many changes this process has made since; after the last one it dies. 0: it lives."""

    def __init__(self, last: int) -> None:
        self.last, self.passed = last, 0
        for name in CHANGES:
            setattr(os, name, self._counted(getattr(os, name)))
        self._open = builtins.open
        builtins.open = io.open = self._opened

    def count(self) -> None:
        self.passed += 1
        if self.passed == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            result = change(*arguments, **named)
            self.count()
            return result

        return counted

    def _opened(self, file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        opened = self._open(file, mode, *arguments, **named)
        if set(mode) & set("wxa+"):
            self.count()
            write = opened.write

            def written(data: Any) -> int:
                length = write(data)
                opened.flush()  # what is on the disk is what the next start finds
                self.count()
                return length

            opened.write = written
        return opened
