"""A whole method under torch.compile: one graph, made once, that computes what the method computes without it."""

import json
import subprocess
import sys

import pytest
import torch

from mls.config import AugmentConfig
from mls.core import methods
from mls.data import Batch, Views, augment_compiled
from mls.engine import optim
from mls.recipes import load_config

KEYS = """data.batch_size=8 dictionary.size=32 model.projection=8 model.hidden=16 model.key_norm=split model.key_group=4
objective.warmup_epochs=0 objective.k=3""".split()


def views(step: int) -> Views:
    draws = torch.Generator().manual_seed(step)
    images = [torch.randn(8, 3, 32, 32, generator=draws) for _ in range(2)]
    return Views(images, [torch.rand(8, 4, generator=draws) for _ in range(2)], torch.arange(8) + 8 * step)


def losses(graphs: list[int] | None) -> list[float]:
    """Of four steps once the dictionary is full."""
    config = load_config("mls_scenes_tiny", KEYS)
    method = methods.build(config)
    method.measuring = False
    optimizer = optim.build(config, method, method.own_rates())
    for step in range(4):
        method.after_step([method(views(step))])
    forward = method if graphs is None else torch.compile(method, backend=counting(graphs), fullgraph=True)
    found = []
    for step in range(4, 8):
        out = forward(views(step))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step([out])
        found.append(out.loss.item())
    return found


def counting(graphs: list[int]):  # type: ignore[no-untyped-def]
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    return backend


@pytest.mark.long
def test_a_step_of_mls_is_one_graph_and_gives_the_losses_of_eager_to_a_millionth() -> None:
    """A graph break would be an error, another graph another entry. In a process of its own: here shapes are checked at
    run time, by wrappers that torch.compile cannot follow."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    graphs, compiled, eager, of_augmentation = json.loads(done.stdout)
    assert len(graphs) == 1
    assert compiled == pytest.approx(eager, rel=1e-6)
    assert len(of_augmentation) == 1  # other draws, the same graph; what it computes: test_augment.py


def augmentation(graphs: list[int]) -> None:
    """Of two batches, in which other samples are turned, blurred and flipped."""
    augment_compiled.program = lambda: compiled
    compiled = torch.compile(augment_compiled.augmented, backend=counting(graphs), fullgraph=True, dynamic=False)
    augment = augment_compiled.CompiledAugment(AugmentConfig(size=32, noise=0.1), 0, "cpu")
    for epoch in (1, 2):
        crops = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        augment(Batch([crops], [torch.zeros(8, 4)], torch.arange(8), epoch))


if __name__ == "__main__":
    made: list[int] = []
    of_augmentation: list[int] = []
    torch.set_num_threads(1)
    compiled = losses(made)
    augmentation(of_augmentation)
    print(json.dumps([made, compiled, losses(None), of_augmentation]))
