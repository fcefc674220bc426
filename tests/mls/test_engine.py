"""The engine on real small data: what it writes, what it refuses, what it skips."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mls
import mls.config
from mls import distributed
from mls.config import MonitorConfig
from mls.core import methods
from mls.core.methods.mls import MLS
from mls.data import Batch, Views
from mls.engine import Run, Trainer, run_folder, trainer
from mls.engine.checkpoint import Checkpoints
from mls.engine.trainer import method_state
from mls.errors import ConfigError, DataError, DivergedError, Stopped, UserError
from mls.monitor import matches, online
from mls.monitor.log import MetricsLog, read_metrics

GOLDEN = Path(__file__).parent / "golden_losses.json"


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        pixels = noise.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")


def test_ten_steps_give_the_stored_losses(tiny: list[str]) -> None:
    """Refactoring must not move a number. After a wanted change: `python tests/mls/test_engine.py` writes them anew."""
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, *TEN_STEPS]), quiet=True)
    stored = json.loads(GOLDEN.read_text())
    losses = [row["loss"] for row in run.metrics() if "loss" in row]
    assert losses == pytest.approx(stored, rel=1e-3)  # other processors sum in another order: see TEN_STEPS
    assert len(losses) == 10


# At the recipe's own rate the last bit of a weight grows to 3 % of the tenth loss, at this one to 0.002 %.
TEN_STEPS = ["data.batch_size=32", "data.scenes.count=160", "optim.epochs=2", "monitor.log_every=1", "optim.lr=0.001"]


def test_a_run_folder_holds_what_the_design_says(tiny: list[str]) -> None:
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", tiny), quiet=True)
    assert isinstance(run, mls.Run)
    names = {path.name for path in run.path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "backbone.safetensors", "backbone.json", "DONE"} <= names
    card = json.loads((run.path / "backbone.json").read_text())
    assert (card["architecture"], card["feature_dim"], card["input_size"]) == ("resnet_tiny", 128, 32)
    assert mls.load_backbone(run.path).feature_dim == 128
    last = run.metrics()[-1]
    for name in ("loss/info_nce", "chance/info_nce", "loss/multi_label", "dictionary/fill", "gradient/info_nce"):
        assert name in last
    for name in ("labels/overlap", "labels/overlap_chance", "knn/map", "health/backbone_rank"):
        assert any(name in row for row in run.metrics())
    assert mls.resume(run, quiet=True).done  # a finished run returns at once


def test_a_checkpoint_of_version_0_1_is_read(tiny: list[str]) -> None:
    """The dictionary stood beside the method's state there."""
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1"]), quiet=True)
    now = Checkpoints(run.checkpoints, 1).newest()
    assert now is not None
    old = {**now, "format": 1, "method": dict(now["method"])}
    old["dictionary"] = old["method"].pop("_extra_state")["dictionary"]
    method = methods.build(run.config)
    method.load_state_dict(method_state(old))
    torch.testing.assert_close(method.state_dict(), now["method"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["moco_v2", "knn_moco"])
def test_other_methods_train(tiny: list[str], method: str) -> None:
    rest = [one for one in tiny if not one.startswith("objective.")]
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*rest, f"objective.method={method}"]), quiet=True)
    assert run.done


def test_two_processes_hold_the_same_dictionary_after_every_step(
    tiny: list[str], tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import hashlib
import mls
import mls.config
from mls import distributed
from mls.data import Batch, Views
from mls.engine import Run, Trainer, run_folder

config = mls.load_config("mls_scenes_tiny", {tiny!r} + ["run.name=run", "optim.epochs=1"])
process = distributed.start()
folder = mls.config.runs_root(config) / "run"
trainer = Trainer(config, Run.create(config) if process.main else Run(folder), process, quiet=True)
after_step = trainer.after_step

def watched():
    rows = trainer.method.dictionary.rows()
    content = b"".join(tensor.numpy().tobytes() for tensor in vars(rows).values())
    with open({str(tmp_path)!r} + f"/rank{{process.rank}}", "a") as file:
        file.write(f"{{trainer.step}} {{len(rows.ids)}} {{hashlib.sha256(content).hexdigest()}}\\n")
    after_step()

trainer.after_step = watched
trainer.train()
distributed.stop()
""")
    done = mls_command(script=script, processes=2)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert len(set(first.splitlines())) == 16


def test_accumulated_micro_batches_make_one_step(tiny: list[str]) -> None:
    config = mls.load_config("mls_scenes_tiny", [*tiny, "engine.accumulate=4", "optim.epochs=1"])
    run = mls.pretrain(config, quiet=True)
    assert (run.path / "DONE").read_text() == "16 steps\n"
    assert run.last("dictionary/fill") == 1.0


def test_moments_are_forgotten_with_the_numbers_that_they_named(tmp_path: Path, tiny: list[str]) -> None:
    write_images(tmp_path / "images", 40)
    settings = [*tiny, "data.source=folder", f"data.root={tmp_path / 'images'}", "engine.max_steps=2", "run.name=run"]
    with pytest.raises(Stopped):
        mls.pretrain(mls.load_config("mls_scenes_tiny", settings), quiet=True)
    run = Run.open(tmp_path / "runs" / "run")
    assert list(run.path.glob("moments/*"))
    (tmp_path / "images" / "000.jpg").unlink()
    with pytest.raises(UserError, match="1 are gone .*000.jpg"):
        mls.resume(run, quiet=True)
    with pytest.raises(Stopped):
        mls.resume(run, ["engine.max_steps=3"], quiet=True, accept_data=True)
    assert not list(run.path.glob("moments/step-000002*")) and run.last_saved == 3


def test_broken_images_are_replaced_listed_and_limited(tmp_path: Path, tiny: list[str]) -> None:
    write_images(tmp_path / "images", 64)
    (tmp_path / "images" / "005.jpg").write_bytes(b"not a picture")
    shutil.copy(tmp_path / "images" / "006.jpg", tmp_path / "images" / "broken.jpg")
    with open(tmp_path / "images" / "broken.jpg", "r+b") as file:
        file.truncate(300)
    settings = [*tiny, "data.source=folder", f"data.root={tmp_path / 'images'}", "optim.epochs=1"]
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*settings, "data.max_unreadable=0.1"]), quiet=True)
    listed = (run.path / "unreadable.txt").read_text()
    assert "005.jpg" in listed
    assert "broken.jpg" in listed
    assert len(listed.splitlines()) == 2
    with pytest.raises(DataError, match="of 65 images cannot be read .*raise data.max_unreadable"):
        mls.pretrain(mls.load_config("mls_scenes_tiny", settings), quiet=True)


def test_mistakes_with_data_are_one_sentence(tmp_path: Path, tiny: list[str]) -> None:
    write_images(tmp_path / "few", 3)
    few = [*tiny, "data.source=folder", f"data.root={tmp_path / 'few'}"]
    with pytest.raises(DataError, match=r"3 images, fewer than one batch: lower data.batch_size \(16\) to 3 or less"):
        mls.pretrain(mls.load_config("mls_scenes_tiny", few), quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        mls.pretrain(mls.load_config("mls_scenes_tiny", [*few, f"data.root={tmp_path / 'empty'}"]), quiet=True)
    assert list((tmp_path / "runs").iterdir()) == []  # a mistake leaves no run folder behind
    with pytest.raises(UserError, match=r"is not a run folder \(it has no config.yaml\)"):
        mls.resume(tmp_path / "few")


@pytest.mark.parametrize(("much", "hints"), [(0.2, 1), (1.0, 0)])
def test_waiting_for_data_is_answered_with_one_hint(
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    much: float,
    hints: int,
) -> None:
    monkeypatch.setattr("mls.engine.trainer.WAITING", much)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):  # a large PNG has to be decoded whole
        Image.new("RGB", (1000, 1000), (i, 2 * i, 99)).save(folder / f"{i}.png", compress_level=1)
    settings = [*tiny, "data.source=folder", f"data.root={folder}", "data.workers=0", "data.batch_size=4"]
    mls.pretrain(mls.load_config("mls_scenes_tiny", [*settings, "optim.epochs=2", "monitor.log_every=1"]))
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert len(re.findall(r"\d+% of the time goes into waiting for data: set data\.workers=\d+", said)) == hints


def test_what_only_the_log_wants_is_worked_out_no_more_often_than_it_is_due(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of monitoring is counted: how long it takes is in the log, under `monitoring` and `probes`."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *words, **named: (counts.update([name]), plain(*words, **named))[1])

    counted(trainer, "gradient_norms")
    for owner, name in ((MLS, "levels_of_chance"), (MLS, "matches"), (MLS, "health"), (online, "features_of"),
                        (matches, "CropDataset")):  # fmt: skip
        counted(owner, name)
    often = ["optim.epochs=4", "data.scenes.count=64", "monitor.log_every=5", "monitor.moments=3"]  # 16 steps
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, *often, "monitor.knn_every_epochs=2"]), quiet=True)
    assert counts == {
        "gradient_norms": 4,  # steps 5, 10, 15 and the last one
        "levels_of_chance": 4,
        "matches": 2 * 3,  # two views at each moment
        "CropDataset": 1,  # their crops are cut once
        "health": 2,
        "features_of": 2 * 2,  # those that are learnt from and those that are asked
    }
    last = run.metrics()[-1]
    assert last["step"] == 16 and last["monitoring"] > 0 and last["probes"] > 0  # of the last step, too


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(tiny: list[str]) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, "engine.device=cuda"]), quiet=True)
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, "engine.precision=fp16"]), quiet=True)


def poisoned(config: mls.config.Config, steps: set[int]) -> Trainer:
    """A trainer whose images hold a NaN at these steps."""
    trainer = Trainer(config, Run.create(config), distributed.start("cpu"), quiet=True)
    augment = trainer.augment

    def with_nan(batch: Batch) -> Views:
        views = augment(batch)
        if trainer.step in steps:
            views.images[0][0, 0, 0, 0] = torch.nan
        return views

    trainer.augment = with_nan
    return trainer


def test_non_finite_steps_are_skipped_counted_and_written_down(tiny: list[str]) -> None:
    trainer = poisoned(mls.load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1"]), steps={4, 5, 9})
    trainer.train()
    assert trainer.run.last("skipped_steps") == 3
    assert trainer.method.dictionary.count == 13
    skipped = [json.loads(line) for line in (trainer.run.path / "skipped.0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [4, 5, 9]
    assert all(len(row["ids"]) == 16 for row in skipped)
    events = [json.loads(line) for line in (trainer.run.path / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["event"] == "skip"] == [4, 5, 9]
    assert all(
        torch.isfinite(value).all() for value in trainer.method.state_dict().values() if isinstance(value, torch.Tensor)
    )


def test_a_run_saves_after_so_many_minutes_too(tiny: list[str]) -> None:
    settings = [*tiny, "optim.epochs=1", "engine.checkpoint_every=1000", "engine.checkpoint_minutes=0.000001"]
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", settings), quiet=True)
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["event"] == "save"] == list(range(1, 17))


def test_too_many_non_finite_steps_in_a_row_end_the_run(tiny: list[str]) -> None:
    config = mls.load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1", "engine.max_bad_steps=3"])
    with pytest.raises(DivergedError, match="3 non-finite steps in a row up to step 6: lower optim.lr"):
        poisoned(config, steps={4, 5, 6}).train()


def test_fp16_that_finds_no_scale_ends_the_run(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scaler leaves out each step with a gradient that is not finite, and says nothing."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0, enabled=True))
    config = mls.load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1"])
    trainer = Trainer(config, Run.create(config), distributed.start("cpu"), quiet=True)
    weight = next(parameter for parameter in trainer.method.parameters() if parameter.requires_grad)
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(DivergedError, match="fp16 has found no scale with finite gradients up to step 12: lower optim"):
        trainer.train()
    assert torch.equal(weight, before)


def test_a_run_is_not_overwritten(tiny: list[str]) -> None:
    config = mls.load_config("mls_scenes_tiny", [*tiny, "run.name=same"])
    Run.create(config)
    with pytest.raises(
        UserError, match="exists already: choose another run.name, or go on with `mls pretrain --resume"
    ):
        mls.pretrain(config, quiet=True)


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError])
def test_a_run_that_ends_while_it_is_built_leaves_no_folder(
    end: type[BaseException], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise end

    monkeypatch.setattr(methods, "build", stop)
    config = mls.load_config("mls_scenes_tiny", tiny)
    with pytest.raises(end):
        mls.pretrain(config, quiet=True)
    assert not run_folder(config).exists()


def test_tensorboard_is_written_when_asked_for(tiny: list[str]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install mls[tensorboard])")
    run = mls.pretrain(
        mls.load_config("mls_scenes_tiny", [*tiny, "optim.epochs=1", "monitor.tensorboard=true"]), quiet=True
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in told.Images("gallery")] == [16]  # of the one moment
    assert told.Scalars("final/loss")[0].value == pytest.approx(run.last("loss"))
    assert "_hparams_/session_start_info" in told.summary_metadata


def test_wandb_gets_pictures_and_final_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged, summary = [], {}
    room = SimpleNamespace(log=lambda values, step: logged.append((step, values)), summary=summary, finish=lambda: None)
    fake = SimpleNamespace(init=lambda **facts: room, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricsLog(tmp_path, MonitorConfig(wandb="project"), "run", {"data": {"limit": 3}})
    log.write(4, 1, {"loss": 0.5, "norm": math.nan})
    log.show(4, "gallery", lambda: np.zeros((2, 3, 3), np.uint8))
    log.conclude()
    log.close()
    assert logged[1] == (4, {"gallery": (2, 3, 3)}) and summary == {"final/loss": 0.5}


def test_mlflow_gets_the_same_in_one_run_after_a_resume_too_and_its_failure_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    tell = lambda name: lambda run, *words, **named: calls.append((name, run, *words, *named.values()))
    room = SimpleNamespace(**{name: tell(name) for name in ("log_batch", "log_image", "log_metric", "update_run")})
    room.set_terminated, room.get_experiment_by_name = tell("set_terminated"), lambda name: None
    room.create_experiment = lambda name: name
    room.create_run = lambda place, run_name: SimpleNamespace(info=SimpleNamespace(run_id=f"{place}-{run_name}"))
    entities = SimpleNamespace(Metric=lambda name, value, time, step: (name, value, step), Param=lambda *both: both)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: room))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    made = lambda: MetricsLog(tmp_path, MonitorConfig(mlflow="study"), "run", {"data": {"limit": 3}})
    with contextlib.closing(made()) as log:
        log.write(4, 1, {"loss": 0.5})
    log = made()
    log.write(5, 1, {"loss": 0.5})
    log.show(5, "gallery", lambda: np.zeros((2, 3, 3), np.uint8))
    log.conclude()
    assert [call[:2] for call in calls] == [(name, "study-run") for name in (
        "log_batch", "set_terminated", "update_run", "log_batch", "log_image", "log_batch", "log_metric")]  # fmt: skip
    assert calls[0][2] == [("loss", 0.5, 4)] and calls[5][2] == [("data.limit", "3")]
    assert calls[4][3:] == ("gallery", 5) and calls[6][2:] == ("final/loss", 0.5)
    told: list[str] = []
    room.log_batch, log.say = lambda *words, **named: 1 / 0, told.append
    log.write(6, 1, {"loss": 0.4})
    log.write(7, 1, {"loss": 0.3})
    log.close()
    assert told == ["MLflow gets nothing more of this run: division by zero"]
    assert [row["step"] for row in read_metrics(log.path)] == [4, 5, 6, 7]


def test_port_in_use_is_one_sentence(
    mls_command: Callable[..., subprocess.CompletedProcess[str]], tiny: list[str]
) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = mls_command("pretrain", "mls_scenes_tiny", *tiny, **rank)
    assert done.returncode == 2
    assert f"port 127.0.0.1:{port} is in use by another job" in done.stderr
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    import tempfile

    from tests.conftest import TINY

    with tempfile.TemporaryDirectory() as folder:
        written = mls.pretrain(
            mls.load_config("mls_scenes_tiny", [*TINY, *TEN_STEPS, f"run.root={folder}"]), quiet=True
        )
        GOLDEN.write_text(json.dumps([row["loss"] for row in written.metrics() if "loss" in row], indent=0) + "\n")
