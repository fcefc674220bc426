"""A ResNet-50 pretraining step and its parts, and the memory that the losses take beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mls.chunks import chunks
from mls.core import methods, products
from mls.core.methods.mls import MLS
from mls.core.methods.moco import Keys, MoCo, Query
from mls.core.queried_rows import QueriedRows
from mls.data import Views
from mls.engine import optim
from mls.recipes import load_config
from mls.tools.bench.memory import peak_bytes
from mls.tools.bench.timing import median_seconds


def added_parts(device: str, batch: int, rows: int, k: int, size: int, rounds: int) -> dict[str, float]:
    """Seconds of MoCo-v2's whole step, and of what MLS does beside it: matching, the multi-label term and its gradient,
    the rows of the second memory. In turns, medians."""
    moco = _method("moco_v2", device, batch, rows, k, size)
    mls = _method("mls", device, batch, rows, k, size)
    assert isinstance(mls, MLS)
    images = [torch.randn(batch, 3, size, size, device=device) for _ in range(2)]
    images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    ids = torch.arange(batch, device=device)
    views = Views(images, [torch.zeros(batch, 4, device=device)] * 2, ids)
    optimizer = optim.build(moco.config, moco)
    g, z = _embeddings(mls, batch, device)
    keys = Keys(g.detach(), z.detach(), ids, torch.zeros(batch, 4, device=device))
    seen, query = QueriedRows(mls.dictionary, ids), Query(g, z)
    positives = mls.pseudo_labels(query, seen, views)

    def step() -> None:
        out = moco(views)
        out.loss.backward()
        optimizer.step()
        moco.after_step([out])
        optimizer.zero_grad(set_to_none=True)

    works: dict[str, Callable[[], object]] = {
        "MoCo-v2 step": step,
        "matching": lambda: mls.pseudo_labels(query, seen, views),
        "multi-label term": lambda: mls.multi_label(z, seen, positives)[0].backward(),
        "backbone rows enqueued": lambda: mls.dictionary.enqueue(*vars(keys).values()),  # the projection's are MoCo's
    }
    return {"rows": rows, **median_seconds(works, device, rounds)}


def fused_memory(device: str, rows: int, batch: int) -> dict[str, float]:
    """Bytes beyond the dictionary's that both losses and their gradients take, in parts and in one piece."""
    method = _method("mls", device, batch, rows, 20, 32, backbone="resnet_tiny")
    assert isinstance(method, MLS)
    at_once = products.ENTRIES
    found = {"rows": float(rows), "batch": float(batch), "in parts": _peak(method, batch, device)}
    products.ENTRIES = batch * rows
    try:
        found["in one piece"] = _peak(method, batch, device)
    finally:
        products.ENTRIES = at_once
    return found


def _peak(method: MLS, batch: int, device: str) -> float:
    g, z = _embeddings(method, batch, device)
    ids = torch.arange(batch, device=device)
    views, keys = Views([], [], ids), Keys(g.detach(), z.detach(), ids, torch.zeros(batch, 4, device=device))

    def losses() -> None:
        seen, query = QueriedRows(method.dictionary, ids), Query(g, z)
        term = method.beside_info_nce(query, seen, views, None)
        assert term is not None
        (method.negatives(query, seen, keys, views).mean() + term).backward()

    return float(peak_bytes(losses, device))


def _method(name: str, device: str, batch: int, rows: int, k: int, size: int, backbone: str = "resnet50") -> MoCo:
    keys = {"objective.method": name, "data.batch_size": batch, "dictionary.size": rows}
    keys |= {"model.backbone": backbone, "augment.size": size, "model.hidden": "null", "optim.lr": 1e-6}
    keys |= {"model.projection": 256, "objective.in_batch_negatives": "false", "model.key_norm": "none"}
    keys |= {"objective.k": k, "objective.loss": "bce", "objective.normalise": "mean"} if name == "mls" else {}
    config = load_config("mls_scenes_tiny", [f"{key}={value}" for key, value in keys.items()])
    method = methods.build(config, "bf16" if device == "cuda" else "fp32")
    assert isinstance(method, MoCo)
    method.to(device).to(memory_format=torch.channels_last)
    widths = method.backbone.feature_dim, config.model.projection
    for part in chunks(rows, 4096):
        ids = torch.arange(part.start, part.stop, device=device)
        memory = [F.normalize(torch.randn(len(ids), width, device=device), dim=1) for width in widths]
        method.dictionary.enqueue(*memory, ids=ids)
    return method


def _embeddings(method: MoCo, batch: int, device: str) -> list[torch.Tensor]:
    widths = method.backbone.feature_dim, method.config.model.projection
    return [F.normalize(torch.randn(batch, width, device=device), dim=1).requires_grad_() for width in widths]
