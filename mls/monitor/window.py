"""Means of what a step says, since the last log line; and how fast the steps went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mls.core.method import StepOutput

# Seconds that are no training: what a run says of itself, and the online probes, of which the configuration says how
# many there are and on how many images.
COSTS = ("monitoring", "probes")


class Window:
    """Means since the last log line, kept on the device; reading them is what makes the CPU wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.pulls: dict[str, float] = {}
        self.labels: dict[str, float] = {}
        self.gradient: Tensor | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        self.began, self.steps, self.waited = time.perf_counter(), 0, 0.0
        self.spent: dict[str, float] = dict.fromkeys(COSTS, 0.0)
        self.cpu = time.process_time()

    @contextmanager
    def measuring(self, what: str = "monitoring") -> Iterator[None]:
        """What is done here is done for the log alone, so the log says what it costs."""
        began = self._now()
        yield
        self.spent[what] += self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was asked of the device before belongs to the training
        return time.perf_counter()

    def add(self, outputs: list[StepOutput]) -> None:
        self.steps += 1
        for out in outputs:
            for name, value in out.scalars.items():
                self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        values = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        values |= {f"gradient/{name}": norm for name, norm in self.pulls.items()} | self.labels
        if self.gradient is not None:
            values["gradient/norm"] = float(self.gradient)
        spent = time.perf_counter() - self.began
        values["steps_per_second"] = self.steps / spent
        values["data_wait"] = self.waited / spent
        values |= {what: seconds / spent for what, seconds in self.spent.items()}
        values["cpu_seconds"] = (time.process_time() - self.cpu) / max(1, self.steps)  # of this process, a step
        self.sums, self.counts, self.pulls, self.labels = {}, {}, {}, {}
        self.restart_clock()
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: float(total) for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {name: torch.tensor(total) for name, total in state["sums"].items()}
        self.counts = dict(state["counts"])
