"""`mls worth`: the same images for all starts, what is stored is found again, intervals and differences by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import models

from mls.config import AugmentConfig
from mls.data.listing import FileSource, list_images
from mls.engine.run import run_folder
from mls.errors import CheckpointError, ConfigError
from mls.eval import splits, worth
from mls.eval.cells import pretraining_config
from mls.eval.paired import half_width
from mls.eval.supervised import prepare
from mls.frozen.probe import share_of
from mls.models import load_backbone, save_backbone
from mls.tools import worth as command

SMALL = """data.name=scenes data.scenes.count=32 data.scenes.test_count=16 augment.size=32 augment.flip=0.0
training.epochs=1 training.batch_size=16 training.device=cpu""".split()


@pytest.fixture
def start(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_backbone(tmp_path, load_backbone("resnet_tiny"), {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
    return str(tmp_path / "backbone.safetensors")


def test_the_published_weights_of_imagenet_are_read_where_torch_keeps_them_or_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(worth, "FEWEST_STEPS", 1)
    ask = lambda: worth.question(SMALL, ["random", "imagenet"], [1.0], 1, "shufflenet_v2_x0_5")
    with pytest.raises(CheckpointError, match="weights shufflenet_v2_x0_5@IMAGENET1K_V1 cannot be had .*: download"):
        ask()
    published = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(models.shufflenet_v2_x0_5().state_dict(), tmp_path / "hub" / "checkpoints" / published)
    asked = ask()
    assert asked.starts["imagenet"] == "torchvision:shufflenet_v2_x0_5" and asked.networks() == {"shufflenet_v2_x0_5"}
    (cell,) = asked.cells["imagenet", 1.0]
    assert 0 <= cell.finish(tmp_path / "runs", quiet=True).values["map"] <= 1


def no_network(*given: object, **more: object) -> None:
    raise OSError("no network")


def test_starts_are_paired_and_what_is_stored_is_not_trained_again(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "FEWEST_STEPS", 2)
    asked = worth.question(SMALL, ["random", start], [1.0, 0.5], 2, "resnet_tiny")
    assert asked.protocol.metric == "map" and asked.networks() == {"resnet_tiny"}
    assert [asked.of(fraction).training.epochs for fraction in asked.fractions] == [2, 1]  # as many steps
    assert list(asked.cells) == [(name, share) for name in asked.starts for share in (0.5, 1.0)]
    rows = [prepare(asked.of(0.5).data, seed).rows for seed in (0, 1)]
    held_out = worth.question([*SMALL, "data.validation=0.25"], ["random"], [1.0], 1, "resnet_tiny")
    assert held_out.images(1.0) == 24
    assert len(rows[0]) == 16 and not torch.equal(*rows)
    before = worth.plan(asked, tmp_path)
    assert (before.cells, before.stored) == (8, 0) and before.seconds > 0
    found = worth.answer(asked, tmp_path)
    after = worth.plan(asked, tmp_path)
    assert (after.stored, after.seconds) == (8, 0) and "nothing to do" in str(after)
    name = Path(start).name
    gains = found.gains(name, 0.5)
    assert gains == pytest.approx(np.subtract(found.values[name, 0.5], found.values["random", 0.5]).tolist())
    assert half_width(gains) == pytest.approx(
        stats.t.interval(0.95, 1, np.mean(gains), stats.sem(gains))[1] - np.mean(gains)
    )
    asked.cells["run", 0.5] = [replace(asked.cells[name, 0.5][0], weights="pretrain:moco_v2_scenes_tiny")]
    run = run_folder(pretraining_config("pretrain:moco_v2_scenes_tiny", 0, tmp_path))
    run.mkdir()
    save_backbone(run, load_backbone(start), {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
    assert worth.plan(asked, tmp_path).stored == 8  # the run is not done
    (run / "DONE").touch()
    assert worth.plan(asked, tmp_path).stored == 9
    table = found.table()
    assert table.header == ["start", "16 (0.5)", "32 (1)", "s a training"]
    assert [row.labels[0] for row in table.rows] == ["random", name, f"{name} − random"]
    assert len(found.verdicts()) == 2 and all(words.startswith("with ") for words in found.verdicts())


def test_a_smaller_share_is_part_of_a_larger_one_and_has_every_class() -> None:
    labels = torch.arange(200) % 7
    few, many = (set(share_of(labels, share, draw=3).tolist()) for share in (0.01, 0.5))
    assert few < many and {int(labels[row]) for row in few} == set(range(7))
    assert len(many) == pytest.approx(100, abs=4)
    both = torch.where(torch.eye(5, 3) > 0, 1, -1)
    assert len(share_of(both, 0.4)) == 2 and len(share_of(both, 0.01)) == 1


def test_verdicts_say_what_the_intervals_allow() -> None:
    found = worth.Answer(None, "map")  # type: ignore[arg-type]
    found.values = {("random", 1.0): [10.0, 11.0, 12.0], ("run", 1.0): [15.0, 16.1, 17.0]}

    class Asked:
        starts, fractions = {"random": "random", "run": "run"}, [1.0]

        def images(self, fraction: float) -> int:
            return 1000

    found.asked = Asked()  # type: ignore[assignment]
    assert found.verdicts() == ["with 1,000 labelled images: worth it (run: +5.0 ± 0.1 points)"]
    found.values["run", 1.0] = [15.0, 3.0, 14.0]
    assert "not told apart from no pretraining" in found.verdicts()[0]
    found.values["run", 1.0] = [15.0]
    found.values["random", 1.0] = [11.0]
    assert "not told apart" in found.verdicts()[0]  # one seed shows nothing
    found.values = {("random", 1.0): [10.0, 11.0, 12.0], ("run", 1.0): [20.0, 21.0, 22.0]}
    assert "worth it" in found.verdicts()[0]  # all gain the same: there is no interval


def test_copies_of_test_images_among_pretraining_images_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    draws = np.random.default_rng(0)
    for number in range(40):
        low = draws.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        picture = Image.fromarray(low).resize((48, 48), Image.Resampling.BICUBIC)
        for folder in ["seen"] * (number < 22) + [f"mine/test/{number % 2}"] * (number >= 20):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / folder / f"{number}.png")
        (tmp_path / f"mine/train/{number % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / f"mine/train/{number % 2}/{number}.png")
    mine = worth.question([f"data.root={tmp_path / 'mine'}"], ["random"], [1.0], 1, "resnet_tiny")
    seen = FileSource("seen", tmp_path / "seen", list_images(tmp_path / "seen"))
    assert worth.leaks(seen, splits.load(mine.protocol.data))[0] == 2


def test_the_command_plans_draws_and_refuses(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "FEWEST_STEPS", 1)
    changes = [change for change in SMALL if not change.startswith("data.name")]
    ask = lambda **more: command.worth("scenes", changes, starts=f"random,{start}", seeds=1, out=tmp_path, **more)
    ask(fractions="1", plan=True)
    assert "2 trainings, 0 of them stored already: about a minute" in capsys.readouterr().out
    assert not (tmp_path / "worth.md").exists()
    ask(fractions="1")
    said = capsys.readouterr().out
    assert "whether test images are among them is not known" in said and "one seed: no interval" in said
    with Image.open(tmp_path / "worth.png") as picture:
        assert picture.width > 300
    with pytest.raises(ConfigError, match="--fractions x: give shares with commas"):
        ask(fractions="x")
    with pytest.raises(ConfigError, match="--fractions 2: each is a share"):
        ask(fractions="2")
    with pytest.raises(ConfigError, match="data.shots and data.fraction are not for `mls worth`: --fractions says"):
        worth.question([*SMALL, "data.shots=5"], ["random"], [1.0], 1, "resnet_tiny")
    with pytest.raises(ConfigError, match="nobody publishes ImageNet weights of resnet_tiny"):
        command.worth("scenes", changes, starts=f"imagenet,{start}", out=tmp_path)
