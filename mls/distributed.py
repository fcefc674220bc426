"""Processes: ranks, gathering, agreement. With one process everything here is the identity, so callers need not ask
how many there are."""

import contextlib
import inspect
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mls.errors import EXIT_LOST, ConfigError, Stopped, UserError, reason

T = TypeVar("T")
STORE_SECONDS = 4.0  # that the processes which are left have to agree on who tells of the one that is not


@dataclass(frozen=True)
class Process:
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto", timeout_minutes: float = 30.0) -> Process:
    """Join the other processes, if a launcher (torchrun, SLURM) started several. Ranks come from the environment."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU, which device=cuda asks for: use cpu or auto, or install a CUDA torch")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and local >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} present): "
            "start as many processes as there are GPUs"
        )
    place = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(minutes=timeout_minutes))
        except (RuntimeError, ValueError) as error:
            raise UserError(_why_not(error)) from error
    if dist.is_initialized():
        where = f"process {os.getpid()} on {socket.gethostname()}"
        dist.distributed_c10d._get_default_store().set(f"place of {rank()}", where)
    return Process(rank(), dist.get_world_size() if dist.is_initialized() else 1, place)


def _why_not(error: Exception) -> str:
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return f"port {where} is in use by another job: start torchrun with another --master-port, or with --standalone"
    return f"the processes could not meet at {where}: {reason(error)}"


@contextlib.contextmanager
def telling_lost_processes(what_to_do: str) -> Iterator[None]:
    """An exchange that fails means that another process is gone, or silent for engine.timeout_minutes. One of those
    that are left says so, at once where one is gone: whoever started them ends them soon. (NCCL ends the process itself
    after that time; then it is the launcher that ends the run.)"""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not _of_an_exchange(error):
            raise
        silent, told = _of_silence(error), Event()
        # The store may be with the process that is silent: then it never answers.
        Thread(target=_tell_once, args=(what_to_do, silent, told), daemon=True).start()
        if not told.wait(STORE_SECONDS):
            _say(f"rank 0, which all others need, {'does not answer' if silent else 'is gone'}: {what_to_do}")
        raise Stopped("", EXIT_LOST) from error


def _of_an_exchange(error: RuntimeError) -> bool:
    """In a backward pass gloo's errors may come without gloo's name.

    >>> [_of_an_exchange(RuntimeError(words)) for words in ("Application timeout caused pair closure", "shapes")]
    [True, False]
    """
    return isinstance(error, dist.DistError) or any(words in str(error) for words in ("gloo", "pair closure"))


def _of_silence(error: RuntimeError) -> bool:
    """
    >>> _of_silence(RuntimeError("Timed out waiting 9ms")), _of_silence(RuntimeError("Application timeout caused pair"))
    (True, True)
    """
    return any(words in str(error).lower() for words in ("timed out", "timeout"))


def _tell_once(what_to_do: str, silent: bool, told: Event) -> None:
    """The first process that notices tells of the others that do not."""
    lost = "another process of this run is gone (its own last words say why)"
    with contextlib.suppress(RuntimeError):  # the store was with the process that is gone
        store = dist.distributed_c10d._get_default_store()
        store.set(f"noticed by {rank()}", "")
        if store.add("told that a process is lost", 1) > 1:
            return told.set()
        if silent:
            time.sleep(STORE_SECONDS / 2)
            others = [other for other in range(world()) if not store.check([f"noticed by {other}"])]
            names = [f"rank {other} ({store.get(f'place of {other}').decode()})" for other in others]
            lost = f"{', '.join(names) or 'a process'} has stopped answering"
    _say(f"{lost}: {what_to_do}")
    told.set()


def _say(words: str) -> None:
    print(f"[rank {rank()}] error: {words}", file=sys.stderr, flush=True)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def in_parallel(network: nn.Module, learns_statistics: bool = True) -> nn.Module:
    """What a training step calls in the place of a network: with several processes the gradients are averaged, and on
    GPUs statistics of batch normalisation are of all processes' images (torch has no such layer for CPUs)."""
    if world() == 1:
        return network
    if learns_statistics and next(network.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network)


def exchanging_buffers(exchange: bool) -> dict[str, Any]:
    """The argument of DistributedDataParallel that says whether each forward starts with rank 0's buffers, under the
    name that this version of torch gives it."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": exchange}


def barrier() -> None:
    if world() > 1:
        dist.barrier()


# torch 2.11 knows only the second name, from 2.13 on it warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.no_grad()
def gather(tensors: Sequence[Shaped[Tensor, "batch ..."]]) -> list[Shaped[Tensor, "world_batch ..."]]:
    """Concatenate each tensor over all processes, in rank order: one collective for all of them, whatever their types.

    Every process must bring the same shapes. No gradient flows.
    """
    if world() == 1:
        return [tensor.detach() for tensor in tensors]
    rows = [tensor.detach().reshape(len(tensor), -1).contiguous() for tensor in tensors]
    packed = torch.cat([row.view(torch.uint8) for row in rows], dim=1)
    out = packed.new_empty((world() * len(packed), packed.shape[1]))
    _all_gather(out, packed)
    parts = out.split([row.shape[1] * row.element_size() for row in rows], dim=1)
    return [
        part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for part, tensor in zip(parts, tensors, strict=True)
    ]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a tensor that nobody used costs no collective
        return tuple(gather(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(None if of_all is None else _own(_added(of_all), dim=0) for of_all in gradients)


class _OwnTotals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        return _own(_added(parts), dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (everyones,) = gather([gradient.T.clone(memory_format=torch.contiguous_format)])
        return everyones.T


def gather_with_gradient(tensors: Sequence[Shaped[Tensor, "batch ..."]]) -> list[Shaped[Tensor, "world_batch ..."]]:
    """`gather`, through which gradients flow: what all processes' losses ask of a row is added up where it came from.

    A loss that a process works out from its own rows of `own_totals` then has the gradient that it would have without
    any exchange, which is what DDP's average of the processes' gradients expects.
    """
    return list(_Gather.apply(*tensors))


def own_totals(parts: Float[Tensor, "sums world_batch"]) -> Float[Tensor, "sums batch"]:
    """The sum over all processes of the parts that each has for everyone's columns; of it this process' own columns."""
    return _OwnTotals.apply(parts)


def maximum(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The largest over all processes, element by element."""
    largest = tensor.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def _added(tensor: Tensor) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, dist.ReduceOp.SUM)
    return total


def _own(of_all: Tensor, dim: int) -> Tensor:
    return of_all.chunk(world(), dim=dim)[rank()].contiguous()


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over all processes: how they agree on a flag."""
    if world() == 1:
        return list(values)
    agreed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    if world() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
        tensor /= world()
    return tensor


def from_main(value: Any) -> Any:
    """A plain Python value as rank 0 has it."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0; its error, too, reaches every process."""
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = action()
        except Exception as caught:
            error = caught
    result, error = from_main((result, error))
    if error is not None:
        raise error
    return result


def total(counts: Tensor) -> Tensor:
    """The sum over all processes, on the CPU."""
    if world() == 1:
        return counts
    place = counts.cuda() if dist.get_backend() == "nccl" else counts
    dist.all_reduce(place, dist.ReduceOp.SUM)
    return place.cpu()


def objects(value: Any) -> list[Any]:
    """Every process' plain Python value, in rank order."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found
