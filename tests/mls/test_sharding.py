"""A dictionary that is spread over processes against one that every process holds whole: the same losses, gradients,
matches and rows. The processes are real ones (gloo); run as a program this file is what each of them does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mls import distributed
from mls.config import ScenesConfig
from mls.core import methods
from mls.core.dictionary import Dictionary
from mls.core.matching import Matches
from mls.core.methods.moco import MoCo
from mls.core.neighbour_lists import NeighbourLists
from mls.core.regions import RegionEncoder, nearest_images, neighbours_of_all
from mls.core.sharding import Sharding
from mls.data import Views
from mls.data.scenes import ScenesSource
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.errors import ConfigError
from mls.models.backbones import TinyResNet
from mls.models.norm import share_statistics
from mls.recipes import load_config

Call = Callable[..., subprocess.CompletedProcess[str]]

BATCH, ROWS = 4, 48  # of each process; of all together
CASES = {
    "as it is": [],
    "own rows excluded": ["dictionary.own_rows=exclude", "objective.normalise=balanced"],
    "keys of the batch as negatives": ["objective.in_batch_negatives=true", "objective.loss=em"],
    "both memories label": ["objective.labels_from=union", "objective.normalise=positives"],
    "where they agree": ["objective.labels_from=intersection", "objective.loss=asl"],
    "backbone rows classify": ["objective.classify_with=backbone", "objective.labels_from=projection"],
    "half precision": ["dictionary.storage=bf16"],
    "MoCo": ["objective.method=moco_v2"],
    "small crops": [],
    "regions and windows": ["objective.labels_from=regions", "objective.regions.soft=0.5", "objective.windows.count=1"],
    "labelled windows": ["objective.windows.count=1", "objective.label_windows=true"],
}


@given(
    world=st.integers(1, 4),
    per_process=st.integers(1, 4),
    portions=st.lists(st.integers(0, 20), max_size=8),
)
def test_the_parts_together_are_the_whole(world: int, per_process: int, portions: list[int]) -> None:
    size, written = world * per_process, 0
    whole = Dictionary(size, backbone=2, projection=1)
    parts = [Dictionary(size, backbone=2, projection=1, sharding=Sharding(rank, world)) for rank in range(world)]
    for batch in portions:
        ids = torch.arange(written, written + batch)
        for dictionary in (whole, *parts):
            dictionary.enqueue(ids[:, None].expand(-1, 2).float(), -ids[:, None].float(), ids)
        written += batch
        rows = whole.rows()
        for part in parts:
            held = part.rows()
            for name, memory in vars(rows).items():
                torch.testing.assert_close(vars(held)[name], part.sharding.of(memory), equal_nan=True, rtol=0, atol=0)
            assert torch.equal(part.ids, rows.ids)
    loaded = Dictionary(size, backbone=2, projection=1, sharding=Sharding(world - 1, world))
    loaded.load_state_dict(whole.state_dict())
    assert torch.equal(loaded.rows().backbone, parts[-1].rows().backbone)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def compared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mls_command: Call
) -> list[dict[str, Any]]:
    """What each of 2 and of 4 processes found."""
    folder = tmp_path_factory.mktemp("found")
    done = mls_command(str(folder), script=Path(__file__), processes=request.param)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]
    assert len(found) == request.param
    return found


@pytest.mark.parametrize("case", CASES)
def test_sharded_rows_give_what_whole_rows_give(compared: list[dict[str, Any]], case: str) -> None:
    for found in compared:
        assert found[case]["loss"] <= 1e-5
        assert found[case]["gradient"] <= 1e-5 * found[case]["largest gradient"]
        assert found[case]["largest gradient"] > 1
        assert found[case]["scalars"] <= 1e-5
        assert found[case]["matches"] in ("the same", "none")
        assert (found[case]["matches"] == "none") == (case == "MoCo")


def test_every_process_holds_its_part_and_the_saved_rows_are_those_of_the_whole(compared: list[dict[str, Any]]) -> None:
    for found in compared:
        assert found["as it is"]["held"] == ROWS // len(compared)
        assert all(found[case]["saved"] for case in CASES)


def test_processes_find_together_the_neighbours_that_one_finds(compared: list[dict[str, Any]]) -> None:
    assert all(found["neighbours"] and found["words"] for found in compared)


def test_keys_are_normalised_as_asked_on_every_process(compared: list[dict[str, Any]]) -> None:
    for found in compared:
        assert found["norms"]["split"]
        assert found["norms"]["sync"] <= 1e-3  # of values of 1; in fp32 inputs of 300 ± 0.05 are exact to 2e-5
        assert found["norms"]["statistics"] <= 1e-3
        assert found["norms"]["window head"] == "SharedNorm1d"


def test_a_gradient_through_gather_and_totals_is_that_of_the_plain_sum(compared: list[dict[str, Any]]) -> None:
    assert all(found["exchange"] <= 1e-12 for found in compared)


def test_gather_brings_every_type_in_one_collective(compared: list[dict[str, Any]]) -> None:
    for found in compared:
        assert found["collectives"] == 1
        assert found["gathered"]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("objective.loss=ll_r", "objective.loss=ll_r looks at all rows of the dictionary at once"),
        ("objective.method=knn_moco", "knn_moco needs all rows at once: use dictionary.sharded=false"),
        ("objective.pseudo_labels=random", "pseudo_labels=random is a control for small runs"),
        ("dictionary.size=49", "dictionary.size 49 does not divide among 2 processes: use 50"),
    ],
)
def test_what_cannot_be_spread_is_one_sentence(override: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(ConfigError, match=why):
        method_of("dictionary.sharded=true", override)


SHORT = """data.scenes.count=320 data.scenes.test_count=64 data.batch_size=32 dictionary.size=160 objective.k=5
optim.epochs=2 monitor.log_every=1 monitor.knn_every_epochs=0 model.projection=16 objective.warmup_epochs=0
optim.lr=0.001 model.key_norm=sync engine.threads=1""".split()  # 10 steps an epoch


@pytest.mark.long
def test_a_sharded_run_goes_on_with_other_numbers_of_processes(tmp_path: Path, mls_command: Call) -> None:
    overrides = ["mls_scenes_tiny", *SHORT, f"run.root={tmp_path}", "--name", "run", "engine.max_steps=8"]
    done = mls_command("pretrain", *overrides, "dictionary.sharded=true", processes=2)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    before = newest(run)
    assert torch.equal(before["ages"], 1 + torch.arange(160) // 32 + 5 * (torch.arange(160) < 3 * 32))

    resume = ["pretrain", "--resume", str(run.path)]
    done = mls_command(*resume, "engine.max_steps=9", processes=4)
    assert done.returncode == 0, done.stderr
    after = newest(run)
    written = (after["ages"] != before["ages"]).nonzero()[:, 0]
    assert written.tolist() == [(8 * 32 + i) % 160 for i in range(32)]
    untouched = torch.ones(160, dtype=torch.bool).index_fill_(0, written, False)
    for name in ("backbone", "projection", "ids", "boxes"):
        assert torch.equal(after[name][untouched], before[name][untouched])

    done = mls_command(*resume, "engine.max_steps=10", "dictionary.sharded=false")
    assert done.returncode == 0, done.stderr
    last = newest(run)
    assert int((last["ages"] != after["ages"]).sum()) == 32


def newest(run: Run) -> dict[str, torch.Tensor]:
    state = Checkpoints(run.checkpoints, 1).newest()
    assert state is not None
    return state["method"]["_extra_state"]["dictionary"]


# ---------------------------------------------------------------------------------------------- what each process does


def method_of(*overrides: str) -> MoCo:
    base = ["data.batch_size=16", f"dictionary.size={ROWS}", "model.projection=16"]
    base += [] if "objective.method=moco_v2" in overrides else ["objective.k=5"]
    config = load_config("mls_scenes_tiny", [*base, "model.key_norm=none", *overrides])
    method = methods.build(config)
    stream = torch.Generator().manual_seed(1)
    for batch in (20, 20, 20):  # over the end of the ring
        rows = [F.normalize(torch.randn(batch, dim, generator=stream), dim=1) for dim in (128, 16)]
        method.dictionary.enqueue(*rows, ids=torch.randint(0, 40, (batch,), generator=stream))
    if regions := getattr(method, "regions", None):
        ids = torch.stack([torch.randperm(40, generator=stream)[:12] for _ in range(40)])
        regions.lists = NeighbourLists.of(Matches(ids, torch.linspace(1, 0, 12).expand(40, -1)), {})
    return method


def views_of(rank: int, crops: int) -> Views:
    stream = torch.Generator().manual_seed(100 + rank)
    images = [torch.randn(BATCH, 3, 32, 32, generator=stream) for _ in range(2)]
    images += [torch.randn(BATCH, 3, 16, 16, generator=stream) for _ in range(crops)]
    return Views(images, [torch.rand(BATCH, 4)] * len(images), torch.arange(rank * BATCH, (rank + 1) * BATCH))


def step(method: MoCo, views: Views) -> tuple[Any, list[torch.Tensor]]:
    out = method(views)
    out.scalars |= out.measure()
    out.loss.backward()
    method.after_step([out])
    return out, [parameter.grad for parameter in method.pair.query.parameters()]


def compare(case: str) -> dict[str, Any]:
    views = views_of(distributed.rank(), crops=2 if case == "small crops" or "windows" in case else 0)
    plain, sharded = (method_of(*CASES[case], f"dictionary.sharded={flag}") for flag in ("false", "true"))
    (first, gradients), (second, others) = step(plain, views), step(sharded, views)
    saved, same = (
        [torch.as_tensor(value).nan_to_num(-1.0) for value in method.dictionary.state_dict().values()]
        for method in (plain, sharded)
    )
    near = [method.eval().matches(views, 4) for method in (plain, sharded)]
    assert near[0] is not None and near[1] is not None
    for one, other in zip(near[0].nearest.values(), near[1].nearest.values(), strict=True):
        torch.testing.assert_close(other.scores, one.scores)
        torch.testing.assert_close(other.all_scores, one.all_scores)
        assert (one.own > 0) == (other.own == one.own > 0)
    matches = "none"
    if first.matched_ids is not None:
        matches = "the same" if torch.equal(first.matched_ids, second.matched_ids) else "others"
    return {
        "loss": abs(first.loss.item() - second.loss.item()),
        "gradient": max((a - b).abs().max().item() for a, b in zip(gradients, others, strict=True)),
        "largest gradient": max(gradient.abs().max().item() for gradient in gradients),
        "scalars": max(abs(value.item() - second.scalars[name].item()) for name, value in first.scalars.items()),
        "matches": matches,
        "held": len(sharded.dictionary.rows().backbone),
        "saved": all(map(torch.equal, saved, same)),
    }


def exchange() -> float:
    """Each process' loss is a function of its own totals; all totals depend on what all processes sent."""
    rank, world = distributed.rank(), distributed.world()
    stream = torch.Generator().manual_seed(5)
    everyone = torch.randn(world * 3, 4, generator=stream).double()
    weights = torch.randn(world, 4, generator=stream).double()  # what each process multiplies with
    own = everyone.view(world, 3, 4)[rank].clone().requires_grad_()
    (gathered,) = distributed.gather_with_gradient([own])
    distributed.own_totals((gathered * weights[rank]).sum(1).square()[None]).sum().backward()
    plain = everyone.view(world, 3, 4)[rank].clone().requires_grad_()
    (plain @ weights.T).square().sum().backward()
    assert own.grad is not None and plain.grad is not None
    return (own.grad - plain.grad).abs().max().item()


def gather() -> tuple[bool, int]:
    rank, world = distributed.rank(), distributed.world()
    all_to_all, calls = distributed._all_gather, []
    distributed._all_gather = lambda *given: (calls.append(1), all_to_all(*given))
    tensors = [torch.full((2, 3), rank + 0.1), torch.tensor([rank, 2**60 + rank]), torch.full((2, 1), rank > 0)]
    found = distributed.gather(tensors)
    distributed._all_gather = all_to_all
    expected = [torch.full((2, 3), r + 0.1) for r in range(world)], [torch.tensor([r, 2**60 + r]) for r in range(world)]
    flags = [torch.full((2, 1), r > 0) for r in range(world)]
    return all(torch.equal(a, torch.cat(b)) for a, b in zip(found, (*expected, flags), strict=True)), len(calls)


def neighbours() -> bool:
    """11 images do not divide among the processes."""
    torch.manual_seed(0)  # the same network everywhere
    config = load_config("mls_regions_scenes_tiny", ["objective.regions.neighbours=4", "objective.regions.grid=3"])
    source, options = ScenesSource(ScenesConfig(count=11, test_count=2)), config.objective.regions
    encoder = RegionEncoder.fitted(TinyResNet(width=4), source, config.augment, options, torch.device("cpu"))
    found, features = neighbours_of_all([encoder], source, options, lambda *done: None)
    alone = nearest_images(encoder(source, range(11)), torch.arange(11), 4, lambda *done: None)
    same = features.shape == (11, 9, 16) and torch.equal(found.indices, alone.indices)
    return same and (found.scores - alone.scores).abs().max().item() < 1e-5


def words() -> bool:
    """All processes have the same bags, those that one process alone would have."""
    keys = ["objective.method=mls_words", "objective.words=8", "data.workers=0", "objective.windows.count=0"]
    method = methods.build(load_config("mls_regions_scenes_tiny", keys))
    method.set_progress(1, 1, 1)
    source = ScenesSource(ScenesConfig(count=11, test_count=2))
    found, _ = method.of_regions(source, None, lambda *done: None)  # type: ignore[operator]
    (everyone,) = distributed.gather([found])
    return found.shape == (11, 8) and all(torch.equal(found, one) for one in everyone.split(11))


def norms() -> dict[str, Any]:
    """Split groups are each process' own; shared statistics are torch's of all images, also as a plain mean over calls
    and where the mean is thousands of times the deviation."""
    rank, world = distributed.rank(), distributed.world()
    keys = ["objective.windows.count=1", "objective.windows.size=16", "model.key_group=2"]
    split, views = method_of("model.key_norm=split", *keys), views_of(rank, crops=2)
    losses = [step(split, views)[0].loss for _ in range(2)]
    everyone = 300 + 0.05 * torch.randn(world * 6, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    plain, shared = (nn.BatchNorm2d(3, momentum=None) for _ in range(2))
    share_statistics(shared)
    for _ in range(2):
        expected, found = plain(everyone).chunk(world)[rank], shared(everyone.chunk(world)[rank])
    statistics = [(plain.state_dict()[name] - value).abs().max() for name, value in shared.state_dict().items()]
    sync = method_of("model.key_norm=sync", "model.head_norm=batch", *keys)
    assert sync.windows is not None
    (head,) = {type(one).__name__ for one in sync.windows.heads.key.modules() if isinstance(one, nn.BatchNorm1d)}
    return {
        "split": all(bool(loss.isfinite()) for loss in losses),
        "sync": (expected - found).abs().max().item(),
        "statistics": max(float(one) for one in statistics),
        "window head": head,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    process = distributed.start("cpu")
    results: dict[str, Any] = {case: compare(case) for case in CASES}
    results["exchange"], results["neighbours"], results["words"] = exchange(), neighbours(), words()
    results["gathered"], results["collectives"] = gather()
    results["norms"] = norms()
    (Path(sys.argv[1]) / f"{process.rank}.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.stop()
