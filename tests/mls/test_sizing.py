"""Sizes that were left `auto`."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mls import engine
from mls.config import SIZED, Config, check, flatten, to_yaml
from mls.core.methods import names
from mls.data.sources import build_source
from mls.distributed import Process
from mls.engine import sizing
from mls.engine.sizing import Facts, advice, choose, tried
from mls.errors import ConfigError, DataError
from mls.eval.cells import config_hash
from mls.recipes import load_config, of_folder, resolve

FOLDER, WORDS = "mls_folder_r50", "mls_words_folder_r50"
OF_FOLDER = [key for key in SIZED if key not in ("objective.windows.size", "objective.regions.size", "objective.words")]


@pytest.mark.parametrize("images", [16, 50, 412, 5_000, 20_000, 1_200_000])
@pytest.mark.parametrize("memory", [None, 24.0])
@pytest.mark.parametrize("processes", [1, 6])
def test_sizes_can_work_for_any_number_of_images(images: int, memory: float | None, processes: int) -> None:
    config, choices = choose(load_config(FOLDER), Facts(images, 300, memory, processes))
    check(config)
    values = dict(flatten(config))
    assert [choice.key for choice in choices] == OF_FOLDER
    assert all(values[choice.key] == choice.value for choice in choices)
    assert not config.run.auto
    batch, rows, epochs = config.data.batch_size, config.dictionary.size, config.optim.epochs
    assert batch % processes == 0
    assert 2 <= batch <= 256
    assert rows <= max(images / 4, batch)
    assert values["objective.k"] <= max(1, rows / 100)
    assert config.optim.warmup_epochs < epochs
    assert values["objective.warmup_epochs"] < epochs
    assert config.engine.checkpoint_every <= max(1, epochs * (images // batch) / 20)


@pytest.mark.parametrize(
    ("images", "memory", "sizes"),
    [(16, None, (16, 16, 16)), (6000, None, (32, 32, 128)), (118_287, 80.0, (112, 112, 1024))],
)
def test_windows_and_words_follow_the_crops_and_the_images(
    images: int, memory: float | None, sizes: tuple[int, int, int]
) -> None:
    config, _ = choose(load_config(WORDS), Facts(images, 16 if images == 16 else 480, memory))
    check(config)
    values = dict(flatten(config))
    assert tuple(values[f"objective.{key}"] for key in ("windows.size", "regions.size", "words")) == sizes


def test_many_photographs_on_a_gpu_get_the_papers_values() -> None:
    config, _ = choose(load_config(FOLDER), Facts(118_287, 480, 80.0))
    paper = Config()
    for key in ("augment.size", "augment.blur", "model.backbone", "data.batch_size", "dictionary.size", "objective.k"):
        assert dict(flatten(config))[key] == dict(flatten(paper))[key]


def test_explicit_values_win_and_the_others_follow_them() -> None:
    few = ["data.batch_size=8", "dictionary.size=32", "optim.epochs=auto", "objective.k=3", "objective.k=auto"]
    config, choices = choose(load_config(FOLDER, few), Facts(5000, 32, None))
    assert (config.data.batch_size, config.dictionary.size) == (8, 32)
    assert "data.batch_size" not in [choice.key for choice in choices]
    assert dict(flatten(config))["objective.k"] == 1
    assert choose(load_config(FOLDER, ["dictionary.size=32"]), Facts(5000, 32, None))[0].data.batch_size == 32


def test_a_batch_that_does_not_fit_is_halved_and_the_others_follow_it() -> None:
    config, facts = load_config(FOLDER), Facts(20_000, 300, 24.0)
    made, choices = choose(config, facts)
    asked: list[int] = []

    def holds(one: Config) -> bool:  # a device that holds 70 images
        asked.append(one.data.batch_size)
        return one.data.batch_size <= 70

    found, told = tried(config, facts, made, choices, holds)
    assert asked == [256, 128, 64] and found.data.batch_size == 64 and not found.run.auto
    assert told[0].reason == "a step with 128 did not fit into the GPU's memory, one with 64 does"
    assert found == choose(load_config(FOLDER, ["data.batch_size=64"]), facts)[0]
    with pytest.raises(ConfigError, match=r"a step of \d+ images does not fit"):
        tried(config, facts, made, choices, lambda one: False)


def test_the_first_of_several_processes_tries_no_step_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "facts_of", lambda *_: Facts(20_000, 300, 24.0, 2))
    monkeypatch.setattr(sizing, "holds", lambda *_: pytest.fail("its keys are gathered from processes that wait"))
    config = load_config("mls_scenes_tiny", ["data.batch_size=auto", "data.scenes.count=32"])
    assert sizing.sized(config, Process(0, 2, torch.device("cuda")), lambda *_: None).data.batch_size == 256


@pytest.mark.parametrize("method", names())
def test_a_step_of_any_method_can_be_tried(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[bool] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    config = load_config("mls_scenes_tiny", [f"objective.method={method}", "data.batch_size=4", "data.scenes.count=8"])
    assert sizing.holds(config, torch.device("cpu"), build_source(config.data).labels) and reset


def test_only_sizes_may_be_auto_and_other_methods_have_other_sizes() -> None:
    with pytest.raises(ConfigError, match="augment.flip"):
        load_config(FOLDER, ["augment.flip=auto"])
    assert not any(key.startswith("objective") for key in load_config(FOLDER, ["objective.method=simsiam"]).run.auto)
    assert load_config("mls_scenes_tiny", ["objective.k=auto"]).run.auto == ["objective.k"]
    assert resolve(FOLDER, ["objective.k=7"]).origins["objective.k"] == "override"


def test_a_run_that_waits_for_its_images_takes_overrides_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(FOLDER, ["data.root=/a"])))
    assert load_config(tmp_path / "config.yaml").run.auto == OF_FOLDER
    given = load_config(tmp_path / "config.yaml", ["optim.epochs=5", "objective.k=auto"])
    assert given.optim.epochs == 5 and given.run.auto == [key for key in OF_FOLDER if key != "optim.epochs"]
    with pytest.raises(ConfigError, match="needs numbers, not auto"):
        config_hash(given)


def test_too_few_images_are_refused_and_few_get_advice() -> None:
    with pytest.raises(DataError, match="15 images are too few"):
        choose(load_config(FOLDER), Facts(15, 32, None))
    config = load_config(FOLDER, ["data.root=/a b"])
    assert "mls_continue 'data.root=/a b' model.weights=torchvision:resnet18" in (
        advice(config, Facts(412, 9, None)) or ""
    )
    assert advice(config, Facts(1000, 9, None)) is None


def test_a_run_of_a_folder_keeps_numbers_and_its_resume_chooses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my: images"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (40, 36), (number, 0, 0)).save(folder / f"{number}.png")
    recipe, *overrides = of_folder([str(folder), "optim.epochs=1", "data.workers=0"])
    config = load_config(recipe, [*overrides, f"run.root={tmp_path}", "run.name=run", "monitor.log_every=1"])
    run = engine.pretrain(config)
    told = capsys.readouterr().err
    assert "sized to 20 images of 36 pixels" in told
    assert "20 images are few" in told
    assert (run.config.augment.size, run.config.data.batch_size, run.config.run.auto) == (32, 8, [])
    assert engine.resume(run, ["engine.keep_last=1"]).config.dictionary == run.config.dictionary
    with pytest.raises(ConfigError, match=r"is a run, no folder of images: `mls pretrain --resume"):
        of_folder([str(run.path)])
