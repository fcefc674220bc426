"""How much memory a piece of work needs at its peak, beyond what was there before."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its own start and stop otherwise


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Of torch's own allocations: on a GPU as its allocator counts them, on a CPU added up from the profiler's record.

    >>> peak_bytes(lambda: torch.zeros(1 << 20) + torch.ones(1 << 20)) >> 20  # three at once
    12
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, held)
    return most


def peak_of_process(work: Callable[[], object], device: str = "cpu") -> int | None:
    """The same for work that does not allocate through torch: what the process holds more at its peak, on a CPU by the
    system's account (None where it keeps none)."""
    if device == "cuda":
        return peak_bytes(work, device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0
