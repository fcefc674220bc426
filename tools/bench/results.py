"""What a bench keeps for others: its numbers, beside the command and the machine that gave them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_results(path: Path, rows: Sequence[Any] | dict[str, Any]) -> None:
    from mls.files import write_atomically

    write_atomically(path, as_json(rows))
    print(path)


def as_json(rows: Sequence[Any] | dict[str, Any]) -> bytes:
    """{"command": …, "machine": {…}, "rows": …}."""
    words = ["mls", *sys.argv[1:]]
    found = {"command": shlex.join(words), "machine": machine(), "rows": rows}
    return json.dumps(found, indent=1).encode() + b"\n"


def machine() -> dict[str, Any]:
    import torch

    import mls
    from mls.data.loader import cores

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {
        "processor": _processor(),
        "cores": cores(),
        "gpu": gpu,
        "load": [round(one, 1) for one in os.getloadavg()],
    }
    return facts | {"mls": mls.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _processor() -> str:
    """Its name where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
