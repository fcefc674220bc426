"""`mls bench saving`: how long a save holds training up, beside how long its state takes to copy."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def saving(
    size: Annotated[int, typer.Option(help="Rows of the dictionary.")] = 65536,
    backbone: Annotated[str, typer.Option(help="Its width gives the width of the rows.")] = "resnet50",
    saves: Annotated[int, typer.Option(help="How many times to save.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to write; a checkpoint's size must be free.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also keep the numbers, as JSON.")] = None,
) -> None:
    """Save the state of a pretraining while small steps are taken, and say what the steps notice of it.

    stall: the seconds that a step waits in `save`. copy: the same state copied with nothing else going on. Steps are
    compared with those that were taken before the first save.

    Examples:

        mls bench saving --size 65536

        mls bench saving --size 4096 --backbone resnet18
    """
    import torch

    from mls.engine.checkpoint import Checkpoints, snapshot
    from mls.engine.session import Saving, Session
    from mls.tools.bench.results import write_results

    class Training:
        step = 0
        state = pretraining_state(size, backbone)

        def state_dict(self) -> dict[str, Any]:
            return {"step": self.step, **self.state}

    training, step = Training(), small_step()
    gigabytes = sum(tensor.nbytes for tensor in tensors(training.state)) / 1e9
    copies = [seconds(lambda: snapshot(training.state_dict())) for _ in range(saves)]
    alone = [seconds(step) for _ in range(100)]
    stalls, beside, writes = [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = Saving(Checkpoints(Path(place), keep_last=1), Path(place) / "events.jsonl", minutes=1e9)
        session = Session(training, saves, store, torch.device("cpu"))
        with session.running(quiet=True):
            for training.step in range(1, saves + 1):
                stalls.append(seconds(session.save))
                while session.writer.busy:
                    beside.append(seconds(step))
                session.writer.wait()
                writes.append(session.writer.seconds)
    found = {"copy": copies, "stall": stalls, "write": writes, "step alone": alone, "step beside the writer": beside}
    _show(gigabytes, found)
    if out is not None:
        write_results(out, {"gigabytes": gigabytes, **found})


def _show(gigabytes: float, found: dict[str, list[float]]) -> None:
    copy, stall, write, usual = (statistics.median(values) for values in list(found.values())[:4])
    print(f"state {gigabytes:.2f} GB: copy {copy:.2f} s, stall {stall:.2f} s, write {write:.2f} s")
    print(f"stall / copy {stall / copy:.2f}")
    if beside := found["step beside the writer"]:
        slower, longest = statistics.median(beside) / usual, 1000 * max(beside)
        print(f"steps beside the writer / alone {slower:.2f} at the median, the longest {longest:.0f} ms")


def pretraining_state(size: int, backbone: str) -> dict[str, Any]:
    """As large as what a run saves: both encoders, the momentum of the optimizer, both memories."""
    import torch

    from mls.models import load_backbone

    query, key = load_backbone(backbone), load_backbone(backbone)
    momentum = [torch.randn_like(parameter) for parameter in query.parameters()]
    memories = {"backbone": torch.randn(size, query.feature_dim), "projection": torch.randn(size, 256)}
    return {"query": query.state_dict(), "key": key.state_dict(), "momentum": momentum, "dictionary": memories}


def small_step() -> Any:
    """A training step of many short operations: what waiting for Python's interpreter lock would slow down most."""
    import torch

    from mls.models import load_backbone

    network, images = load_backbone("resnet_tiny").train(), torch.randn(4, 3, 32, 32)
    return lambda: network(images).sum().backward()


def tensors(state: Any) -> list[Any]:
    import torch

    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in values for tensor in tensors(value)]


def seconds(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
