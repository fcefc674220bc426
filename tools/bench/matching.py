"""`mls bench matching`: what it costs to find the k nearest rows of a dictionary, as the dictionary grows, beside a
ResNet-50 step of the same run; what MLS adds to MoCo-v2's step; and the memory of the loss in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mls.tools.bench.searches import Search

WIDTHS = (512, 2048)  # ResNet-18's and ResNet-50's features
QUERIES = (16, 64, 256)
SIZES = [4**power for power in range(6, 11)]  # 4,096 to 1,048,576 rows
LIMITS = {4096: 0.03, 65536: 0.08}  # what MLS may add to a step, by dictionary size
FUSED = (262_144, 256)  # rows and batch


def bench(
    batch: Annotated[int | None, typer.Option(min=1, help="Images of the step; default 16, on a GPU 256.")] = None,
    queries: Annotated[
        list[int] | None, typer.Option(min=1, help="Of a search. May be repeated. Default: 16, 64, 256.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=4096, help="The largest dictionary; memory may allow less.")] = SIZES[-1],
    k: Annotated[int, typer.Option(min=1)] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="All back-ends once a round, in turns; medians are printed.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: up to 16,384 rows, small images.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also keep all numbers, as JSON.")] = None,
) -> None:
    """Measure the exact back-ends side by side, and the approximate index of the offline tools beside them.

    Everything is measured on the CPU, and again on a GPU where there is one. Times are medians.

    Examples:

        mls bench matching --quick

        mls bench matching --max-rows 262144 --out matching.json
    """
    import torch

    from mls.tools.bench.results import write_results

    found = {}
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            print("on a GPU: not measured, there is none")
            continue
        images = batch or (4 if quick else 256 if device == "cuda" else 16)
        rows = min(max_rows, SIZES[1]) if quick else max_rows
        found[device] = _measure_steps(device, images, rows, k, quick) | _measure_searches(
            device, queries or QUERIES, rows, k, rounds, WIDTHS[:1] if quick else WIDTHS
        )
    if out is not None:
        write_results(out, found)


def _measure_steps(device: str, batch: int, max_rows: int, k: int, quick: bool) -> dict[str, Any]:
    import torch

    from mls.tools.bench.steps import added_parts, fused_memory

    size = 64 if quick else 224
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    print(f"## {device}: batch {batch}, k {k}{threads}, images of {size} pixels\n")
    parts = []
    for rows in [rows for rows in LIMITS if rows <= max_rows]:
        typer.echo(f"a ResNet-50 step with {rows:,} rows", err=True)
        parts.append(added_parts(device, batch, rows, k, size, rounds=2 if device == "cpu" else 10))
    _print_parts(parts)
    memory = fused_memory(device, *((65_536, 256) if quick else FUSED))
    _print_memory(memory)
    return {"batch": batch, "k": k, "parts": parts, "memory": memory}


def _measure_searches(
    device: str, queries: Sequence[int], max_rows: int, k: int, rounds: int, widths: Sequence[int]
) -> dict[str, Any]:
    from dataclasses import asdict

    from mls.tools.bench.searches import exponents, fits, searches

    found: list[Search] = []
    for width in widths:
        for count in [count for count in SIZES if count <= max_rows and fits(count, width, device)]:
            typer.echo(f"searching {count:,} x {width}", err=True)
            found += searches(device, queries, count, width, k, rounds)
    _print_searches(found, k)
    slopes = exponents(found)
    print("time ~ rows^x: " + ", ".join(f"{name} x = {slope:.2f}" for name, slope in slopes.items()) + "\n")
    return {"searches": [asdict(search) for search in found], "exponents": slopes}


def _print_parts(parts: list[dict[str, float]]) -> None:
    from mls.tables import print_table

    lines = []
    for part in parts:
        rows, step = int(part["rows"]), part["MoCo-v2 step"]
        added = [part[name] for name in ("matching", "multi-label term", "backbone rows enqueued")]
        shares = [f"{1e3 * one:.1f} ms" for one in added]
        lines.append([f"{rows:,}", f"{step:.2f} s", *shares, f"{sum(added) / step:.2%}", f"{LIMITS[rows]:.0%}"])
    header = ["rows", "MoCo-v2 step", "matching", "multi-label term", "enqueue", "MLS adds", "at most"]
    print("What MLS adds to MoCo-v2's ResNet-50 step\n")
    print_table(header, lines)
    print()


def _print_searches(found: list[Search], k: int) -> None:
    from mls.tables import print_table

    exact = {(s.width, s.rows, s.queries): s.seconds for s in found if s.name == "torch"}

    def line(search: Search) -> list[str]:
        ratio = search.seconds / exact[search.width, search.rows, search.queries]
        note = "exact" if search.recall is None else f"recall@{k} {search.recall:.3f}, built in {search.built:.1f} s"
        cost = [f"{1e3 * search.seconds:.1f} ms", f"{ratio:.2f}", f"{search.peak / 2**20:.1f} MiB"]
        return [str(search.width), f"{search.rows:,}", str(search.queries), search.name, *cost, note]

    header = ["d", "rows", "queries", "back-end", "a search", "of torch's", "peak memory", "answer"]
    print(f"Finding the {k} nearest rows\n")
    print_table(header, list(map(line, found)))
    print()


def _print_memory(memory: dict[str, float]) -> None:
    from mls.tables import print_table

    lines = [[name, f"{memory[name] / 2**20:.0f} MiB"] for name in ("in one piece", "in parts")]
    share = memory["in parts"] / memory["in one piece"]
    print_table(["InfoNCE and BCE, forward and backward", "peak of extra memory"], lines)
    print(f"\n{int(memory['rows']):,} rows, batch {int(memory['batch'])}: {share:.1%} of the memory\n")
