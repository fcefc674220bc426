"""Matching: which rows of the dictionary are nearest to a query. Every back-end gives the same answer: scores to 1e-5,
indices wherever the scores differ by more than that. Approximate indexes (index.py) are not for a training's step."""

import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mls.chunks import chunks
from mls.core.products import Mask
from mls.distributed import from_main, rank
from mls.errors import ConfigError, unknown_name

AUTO = "auto"  # in a configuration: measure, and take the fastest
GPU_SCRATCH = 256 << 20  # bytes that faiss may use beside its results; by itself it takes a share of the whole GPU


@dataclass(frozen=True)
class Matches:
    """The rows nearest to each query, nearest first. A score of -inf stands where no row was left to match."""

    indices: Int64[Tensor, "batch k"]
    scores: Float[Tensor, "batch k"]


@runtime_checkable
class Matcher(Protocol):
    def topk(
        self,
        queries: Float[Tensor, "batch dim"],
        rows: Float[Tensor, "rows dim"],
        k: int,
        exclude: Mask | None = None,
    ) -> Matches:
        """The k rows with the largest inner product. Where `exclude` is True a row may not be matched."""
        ...


class TorchMatcher:
    """Matrix product and top-k in fp32, `chunk` rows at a time: no more than batch x chunk scores exist at once.

    >>> rows = torch.eye(4)
    >>> TorchMatcher().topk(torch.tensor([[0.1, 0.5, 0.0, 0.9]]), rows, k=2).indices
    tensor([[3, 1]])
    """

    def __init__(self, chunk: int = 16384) -> None:
        if chunk < 1:
            raise ConfigError(f"chunk {chunk} leaves no rows to match: set chunk to 1 or more")
        self.chunk = chunk

    @torch.no_grad()
    def topk(
        self,
        queries: Float[Tensor, "batch dim"],
        rows: Float[Tensor, "rows dim"],
        k: int,
        exclude: Mask | None = None,
    ) -> Matches:
        check_k(k, len(rows))
        best: Matches | None = None
        for part in chunks(len(rows), self.chunk):
            found = self.of_part(queries, rows[part], k, None if exclude is None else exclude[:, part])
            found = Matches(found.indices + part.start, found.scores)
            best = found if best is None else merge(best, found, k)
        assert best is not None
        return best

    def of_part(self, queries: Tensor, rows: Tensor, k: int, exclude: Tensor | None) -> Matches:
        # Autocast would turn the product to bf16, where a hundredth of a cosine is lost and neighbours swap places.
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries.float() @ rows.float().T  # [batch, part]
        if exclude is not None:
            scores = scores.masked_fill(exclude, -torch.inf)
        values, indices = scores.topk(min(k, len(rows)), dim=1)
        return Matches(indices, values)


class FaissMatcher(TorchMatcher):
    """faiss' exhaustive search, on the device where the tensors are. fp32 rows are searched as they lie, half-precision
    rows `chunk` at a time in fp32. faiss knows no mask for each query, so with `exclude` it is torch that answers:
    to look for k + n rows and drop up to n, n would have to come from the GPU, and the step would wait for it.

    >>> FaissMatcher().topk(torch.tensor([[0.1, 0.5, 0.0, 0.9]]), torch.eye(4), k=2).indices
    tensor([[3, 1]])
    """

    def __init__(self, chunk: int = 16384) -> None:
        super().__init__(chunk)
        self.faiss = _faiss()

    @torch.no_grad()
    def topk(
        self,
        queries: Float[Tensor, "batch dim"],
        rows: Float[Tensor, "rows dim"],
        k: int,
        exclude: Mask | None = None,
    ) -> Matches:
        if exclude is not None or rows.dtype != torch.float32 or len(queries) == 0:
            return super().topk(queries, rows, k, exclude)
        check_k(k, len(rows))
        return self.of_part(queries, rows, k, None)

    def of_part(self, queries: Tensor, rows: Tensor, k: int, exclude: Tensor | None) -> Matches:
        if exclude is not None or len(queries) == 0:
            return super().of_part(queries, rows, k, exclude)
        queries, rows = queries.detach().float().contiguous(), rows.detach().float().contiguous()
        k = min(k, len(rows))
        metric = self.faiss.METRIC_INNER_PRODUCT
        if queries.is_cuda:
            scores, indices = self.faiss.knn_gpu(
                _gpu_resources(), queries, rows, k, metric=metric, device=queries.device.index
            )
            return Matches(indices, scores)
        self.faiss.omp_set_num_threads(torch.get_num_threads())  # it has threads of its own, as many as cores
        scores, indices = self.faiss.knn(queries.numpy(), rows.numpy(), k, metric=metric)
        return Matches(torch.from_numpy(indices), torch.from_numpy(scores))


def _faiss() -> Any:
    import faiss  # after torch: in the other order some builds of the two crash

    return faiss


@cache
def _gpu_resources() -> Any:
    """One for the process: each holds memory of its own."""
    import faiss
    import faiss.contrib.torch_utils  # teaches knn_gpu to take torch tensors and their stream

    if not hasattr(faiss, "StandardGpuResources"):
        replace = "`pip uninstall faiss-cpu` and then `pip install faiss-gpu`"
        raise ConfigError(f"this faiss knows no GPUs: use matching.backend=torch, or {replace}")
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH)
    return resources


def check_k(k: int, rows: int) -> None:
    """Every back-end's first question."""
    if not 1 <= k <= rows:
        raise ConfigError(f"k = {k} matches cannot be found among {rows} rows: choose k from 1 to {rows}")


def merge(first: Matches, second: Matches, k: int) -> Matches:
    """The best k of two: exact, since a row among the best of all is among the best of its part."""
    scores = torch.cat([first.scores, second.scores], dim=1)
    indices = torch.cat([first.indices, second.indices], dim=1)
    values, places = scores.topk(min(k, scores.shape[1]), dim=1)
    return Matches(indices.gather(1, places), values)


MATCHERS: dict[str, type[TorchMatcher]] = {"torch": TorchMatcher, "faiss": FaissMatcher}


def names() -> list[str]:
    return sorted(MATCHERS)


def build(name: str, **options: Any) -> Matcher:
    """
    >>> build("torch", chunk=1024).chunk
    1024
    """
    if name not in MATCHERS:
        raise unknown_name("matcher", name, [*names(), AUTO])
    known = inspect.signature(MATCHERS[name]).parameters
    for option in options:
        if option not in known:
            raise unknown_name(f"option of matcher {name}", option, known)
    try:
        return MATCHERS[name](**options)
    except ImportError as error:
        raise ConfigError(
            f"matching.backend={name} needs faiss, which cannot be imported ({error}): pip install faiss-cpu "
            "(faiss-gpu to search on a GPU), or use matching.backend=torch"
        ) from None


def settle(
    backend: str, decided: dict[str, Any], search: Callable[[], tuple[Tensor, Tensor, int]] | None
) -> tuple[Matcher, dict[str, Any]]:
    """The matcher of a run, and what to remember of the choice. backend=auto takes the one that rank 0 finds fastest
    for searches like `search()` (queries, rows, k); torch where there is none to measure; on a resume what was
    `decided` before.

    >>> settle("torch", {}, None)[1]
    {}
    """
    if backend != AUTO:
        return build(backend), {}
    if not decided:
        seconds = {"torch": math.nan} if search is None else seconds_of_each(*search()) if rank() == 0 else {}
        seconds = from_main(seconds)
        decided = {"backend": next(iter(seconds)), "measured": format_seconds(seconds)}
    return build(decided["backend"]), decided


def seconds_of_each(
    queries: Float[Tensor, "batch dim"], rows: Float[Tensor, "rows dim"], k: int, rounds: int = 5
) -> dict[str, float]:
    """The median time of a search with each back-end that can be used here, in turns, the fastest first."""
    matchers = {name: matcher for name in names() if (matcher := _if_it_can(name, queries)) is not None}
    times: dict[str, list[float]] = {name: [] for name in matchers}
    for number in range(rounds + 1):
        for name, matcher in matchers.items():
            spent = seconds_of(matcher, queries, rows, k)
            if number:  # the first round warms up
                times[name].append(spent)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def seconds_of(matcher: Matcher, queries: Tensor, rows: Tensor, k: int) -> float:
    _wait(queries)
    start = time.perf_counter()
    matcher.topk(queries, rows, k)
    _wait(queries)
    return time.perf_counter() - start


def _if_it_can(name: str, queries: Tensor) -> Matcher | None:
    try:
        matcher = build(name)
        matcher.topk(queries[:1], queries[:1], 1)
    except (ConfigError, RuntimeError):  # not installed, or built for other GPUs
        return None
    return matcher


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def format_seconds(seconds: dict[str, float]) -> list[str]:
    """
    >>> format_seconds({"faiss": 0.0123, "torch": 0.02})
    ['faiss 12.3 ms', 'torch 20.0 ms']
    """
    return [f"{name} {1e3 * spent:.1f} ms" for name, spent in seconds.items()]
