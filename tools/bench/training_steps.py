"""The steps that `mls bench step` times, and how they are counted."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from mls.chunks import chunks
from mls.config import AugmentConfig
from mls.core import methods
from mls.core.methods.moco import MoCo
from mls.data import Batch, Views
from mls.data.augment import Augment
from mls.data.augment_compiled import CompiledAugment
from mls.engine import optim
from mls.errors import reason
from mls.models.momentum import precision_on
from mls.recipes import load_config

WIDTH, TEMPERATURE, MOMENTUM = 128, 0.2, 0.999
ENCODERS = "encoders, optimizer"
Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    device: str
    backbone: str
    batch: int
    size: int
    rows: int

    def images(self) -> list[Tensor]:
        draws = torch.Generator().manual_seed(0)
        shape = (self.batch, 3, self.size, self.size)
        images = [torch.randn(shape, generator=draws).to(self.device) for _ in range(2)]
        return [one.contiguous(memory_format=torch.channels_last) for one in images]


class Dispatches(TorchDispatchMode):
    """Counts what reaches the kernels; views cost none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def measure(setting: Setting, rounds: int, compiled: bool) -> dict[str, Any]:
    steps, parts = _steps(setting, compiled)
    seconds = _in_turns(steps | parts, setting.device, rounds)
    alone = seconds[ENCODERS]
    found = {}
    for name, step in steps.items():
        ratio = statistics.median(one / other for one, other in zip(seconds[name], alone, strict=True))
        row = {"seconds": statistics.median(seconds[name]), "ratio": ratio, **_waits_and_memory(step, setting.device)}
        found[name] = row | {"dispatches": None if "compiled" in name or "graphs" in name else dispatches(step)}
    return {
        "setting": vars(setting),
        "steps": found,
        "not installed": [] if "lightly" in found else ["lightly"],
        "parts": {name: statistics.median(seconds[name]) for name in parts},
        "bound": _bounds(setting.device),
    }


def dispatches(work: Step) -> int:
    with Dispatches() as mode:
        work()
    return mode.count


def _in_turns(works: dict[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Processor time on a CPU, which other work on the machine moves less; on a GPU the clock's."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 2):  # two rounds warm up
        for name, work in works.items():
            began = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if number > 1:
                times[name].append(clock() - began)
    return times


def _waits_and_memory(step: Step, device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"waits": None, "memory": None}
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(one.message) for one in said)
    return {"waits": waits, "memory": torch.cuda.max_memory_allocated() / 2**30}


def _bounds(device: str) -> dict[str, float]:
    side, half = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    one = torch.randn(side, side, device=device, dtype=half)
    large, other = (torch.empty(2**25, device=device) for _ in range(2))
    works: dict[str, Step] = {"product": lambda: one @ one, "copy": lambda: large.copy_(other)}
    best = {name: min(times) for name, times in _in_turns(works, device, 5).items()}
    return {"flops": 2 * side**3 / best["product"], "bytes": 2 * 4 * large.numel() / best["copy"]}


def _steps(setting: Setting, compiled: bool) -> tuple[dict[str, Step], dict[str, Step]]:
    steps = {ENCODERS: _encoders(setting), "ours, moco_v2": _ours("moco_v2", setting)[0]}
    steps["ours, mls"], parts = _ours("mls", setting)
    if compiled:
        steps |= {f"ours, {name}, compiled": _ours(name, setting, compiled=True)[0] for name in ("moco_v2", "mls")}
    steps["official MoCo, fp32"] = _official(setting, half=False)
    if setting.device == "cuda":
        if compiled:
            steps |= _where_it_holds("ours, moco_v2, CUDA graphs", setting)
        steps["official MoCo, bf16"] = _official(setting, half=True)
    try:
        steps["lightly"] = _lightly(setting)
    except ImportError:
        print("lightly: not measured, it is not installed")
    return steps, parts


def _where_it_holds(name: str, setting: Setting) -> dict[str, Step]:
    """Not tried on a GPU: what torch cannot capture is told, and ends nothing."""
    step = _ours("moco_v2", setting, compiled=True, mode="reduce-overhead")[0]
    try:
        step()
        return {name: step}
    except Exception as error:  # torch's own kinds
        print(f"{name}: not measured, {reason(error)}")
        return {}


def ours(name: str, setting: Setting) -> MoCo:
    keys = {"objective.method": name, "data.batch_size": setting.batch, "dictionary.size": setting.rows}
    keys |= {"model.backbone": setting.backbone, "augment.size": setting.size, "model.hidden": "null", "optim.lr": 1e-4}
    keys |= {"model.projection": WIDTH, "model.head_norm": "none", "objective.in_batch_negatives": "false"}
    keys |= {"model.key_norm": "none"}  # as with the others, none of which has processes to shuffle over
    keys |= {"objective.warmup_epochs": 0} if name == "mls" else {}
    config = load_config("mls_scenes_tiny", [f"{key}={value}" for key, value in keys.items()])
    method = methods.build(config, precision_on(torch.device(setting.device), "auto"))
    assert isinstance(method, MoCo)
    method.to(setting.device).to(memory_format=torch.channels_last)
    for part in chunks(setting.rows, 4096):
        ids = torch.arange(part.start, part.stop, device=setting.device)
        widths = (method.backbone.feature_dim, WIDTH)
        memory = [F.normalize(torch.randn(len(ids), width, device=setting.device), dim=1) for width in widths]
        method.dictionary.enqueue(*memory, ids=ids)
    return method


def _ours(name: str, setting: Setting, compiled: bool = False, mode: str | None = None) -> tuple[Step, dict[str, Step]]:
    """The step of `Trainer.train_step`, without what it logs; and its parts."""
    method = ours(name, setting)
    optimizer = optim.build(method.config, method, method.own_rates())
    boxes = [torch.zeros(setting.batch, 4, device=setting.device)] * 2
    views = Views(setting.images(), boxes, torch.arange(setting.batch, device=setting.device))
    forward = torch.compile(method, fullgraph=True, mode=mode) if compiled else method

    buffers = [buffer for buffer in method.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in buffers]

    def step() -> None:
        torch._foreach_copy_(before, buffers)
        out = forward(views)
        out.loss.backward()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not bool(torch.isfinite(torch.stack([out.loss.detach(), norm])).all()):
            raise RuntimeError("a step was not finite")
        optimizer.step()
        method.after_step([out])
        optimizer.zero_grad(set_to_none=True)

    def both_ways() -> None:
        forward(views).loss.backward()

    parts: dict[str, Step] = {
        "forward and backward": both_ways,
        "optimizer": optimizer.step,
        "moving average": lambda: method.pair.update(MOMENTUM),
    }
    return step, parts


def _encoders(setting: Setting) -> Step:
    """The floor of any such method: one view forward and backward, the other forward, the optimizer's step."""
    pair, images = ours("moco_v2", setting).pair, setting.images()
    optimizer = torch.optim.SGD(pair.query.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, foreach=True)

    def step() -> None:
        z1 = pair.query(images[0])[1]
        with torch.no_grad():
            z2 = pair.key(images[1])[1]
        (z1 * z2).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _official(setting: Setting, half: bool) -> Step:
    """The step of facebookresearch/moco (MoCo-v2) in one process, line for line: builder.py and main_moco.py."""
    query = getattr(models, setting.backbone)(num_classes=WIDTH)
    width = query.fc.in_features
    query.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), query.fc)
    query = query.to(setting.device)
    key = copy.deepcopy(query).requires_grad_(False)
    queue = F.normalize(torch.randn(WIDTH, setting.rows, device=setting.device), dim=0)
    optimizer = torch.optim.SGD(query.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
    images = [image.contiguous() for image in setting.images()]

    def step() -> None:
        with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=half):
            q = F.normalize(query(images[0]), dim=1)
            with torch.no_grad():
                for param_q, param_k in zip(query.parameters(), key.parameters(), strict=True):
                    param_k.data = param_k.data * MOMENTUM + param_q.data * (1.0 - MOMENTUM)
                k = F.normalize(key(images[1]), dim=1)
            l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
            l_neg = torch.einsum("nc,ck->nk", [q, queue.clone().detach()])
            logits = torch.cat([l_pos, l_neg], dim=1) / TEMPERATURE
            labels = torch.zeros(logits.shape[0], dtype=torch.long, device=setting.device)
            queue[:, : setting.batch] = k.T
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _lightly(setting: Setting) -> Step:
    """lightly's example of MoCo in plain PyTorch, on its loss, head and moving average; in our precision and layout."""
    from lightly.loss import NTXentLoss  # pyright: ignore
    from lightly.models.modules import MoCoProjectionHead  # pyright: ignore
    from lightly.models.utils import update_momentum  # pyright: ignore

    backbone = getattr(models, setting.backbone)()
    width, backbone.fc = backbone.fc.in_features, nn.Identity()
    query = nn.Sequential(backbone, MoCoProjectionHead(width, width, WIDTH)).to(setting.device)
    query = query.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    key = copy.deepcopy(query).requires_grad_(False)
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(setting.rows, WIDTH)).to(setting.device)
    optimizer = torch.optim.SGD(query.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
    images, half = setting.images(), setting.device == "cuda"

    def step() -> None:
        update_momentum(query, key, m=MOMENTUM)
        with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=half):
            z1 = query(images[0])
            with torch.no_grad():
                z2 = key(images[1])
        loss = criterion(z1.float(), z2.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def augmentation(device: str, compiled: bool, batch: int = 64, size: int = 64) -> dict[str, int]:
    """Dispatches for two views of a batch: all of it on the device, the same as one compiled program (the kernels that
    it was made into, which both views run), and what is left after the workers."""
    config = AugmentConfig(size=size)
    crops = [torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8) for _ in range(2)]
    made = Batch(crops, [torch.zeros(batch, 4)] * 2, torch.arange(batch), epoch=1)
    augment = Augment(config, 0, device)
    found = {"engine.augment=device": dispatches(lambda: augment(made))}
    if compiled:
        before = metrics.generated_kernel_count
        CompiledAugment(config, 0, device)(made)
        found["engine.augment=device, compiled, kernels a view"] = metrics.generated_kernel_count - before
    made.augmented = True
    found["engine.augment=worker, normalisation"] = dispatches(lambda: augment(made))
    return found
