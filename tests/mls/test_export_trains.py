"""The recipes of an export start a training in the real frameworks, on the embedded scenes in published layouts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from mls.data.layouts import write
from mls.exporting import export
from mls.frameworks import installed as frameworks

SMALL = """MODEL.DEVICE cpu SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.RPN.POST_NMS_TOPK_TEST 20 TEST.PRECISE_BN.NUM_ITER 2""".split()
SMALL += ["INPUT.MIN_SIZE_TRAIN", "(64,)"]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.save(resnet18().state_dict(), tmp_path / "net.pth")
    export(tmp_path / "net.pth", out=tmp_path / "export")
    return tmp_path / "export"


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_detectron2_trains_from_the_recipe_wherever_the_folder_is(exported: Path, tmp_path: Path) -> None:
    if frameworks.missing("detectron2"):
        pytest.skip("detectron2 is not installed: `mls doctor --frameworks` has the command")
    write("coco", tmp_path / "coco", 8, 2, size=64)
    moved = exported.rename(tmp_path / "elsewhere")
    recipe, data = moved / "detectron2_fpn.yaml", tmp_path / "coco"
    where = ["--config-file", recipe, "--coco", data, "--num-gpus", 0, "OUTPUT_DIR", tmp_path / "out"]
    output = run(moved / "detectron2_train.py", *where, *SMALL)
    assert f"Loading from {moved / 'backbone.pkl'}" in output
    assert (tmp_path / "out" / "model_final.pth").is_file()


@pytest.mark.slow
def test_mmseg_trains_from_the_configuration_wherever_the_folder_is(exported: Path, tmp_path: Path) -> None:
    if frameworks.missing("mmseg"):
        pytest.skip('mmsegmentation is not installed: pip install "mls[mmseg]"')
    write("cityscapes", tmp_path / "city", 4, 2, size=64)
    moved = exported.rename(tmp_path / "elsewhere")
    train = Path(frameworks.load("mmseg").__file__).parent / ".mim" / "tools" / "train.py"
    options = ["train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2", "model.test_cfg.mode=whole"]
    options += ["train_dataloader.dataset.pipeline.2.scale=(64,64)", "val_dataloader.dataset.pipeline.1.scale=(64,64)"]
    options += ["train_dataloader.dataset.pipeline.3.crop_size=(49,49)", "model.data_preprocessor.size=(49,49)"]
    for part in ("train_dataloader", "val_dataloader"):
        options += [f"{part}.dataset.data_root={tmp_path / 'city'}"]
        options += [f"{part}.num_workers=0", f"{part}.persistent_workers=False"]
    call = [train, moved / "mmseg_config.py", "--work-dir", tmp_path / "out"]
    output = run(*call, "--cfg-options", "train_cfg.max_iters=2", *options)
    assert f"load model from: {moved / 'backbone.pth'}" in output
    assert "mIoU" in output
    output = run(*call, "--resume", "--cfg-options", "train_cfg.max_iters=4", *options)
    assert "resumed epoch: 0, iter: 2" in output and (tmp_path / "out" / "iter_4.pth").is_file()
