"""`mls export`, `mls verify-export` and `mls doctor` as a user calls them."""

from pathlib import Path

import torch
from torchvision.models import resnet18

from mls.frameworks import installed as frameworks
from mls.frameworks.installed import DETECTRON2


def test_a_run_is_exported_checked_and_loaded_again(mls_command, tmp_path: Path) -> None:
    state = {f"module.encoder_q.{name}": tensor for name, tensor in resnet18().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "moco.pth.tar")
    done = mls_command("export", str(tmp_path / "moco.pth.tar"), "--to", "torchvision,detectron2")
    assert done.returncode == 0, done.stderr
    assert "behind the prefix 'module.encoder_q.', left out: fc; mean and std are taken to be ImageNet's" in done.stderr
    assert "100 of 100" in done.stdout
    out = tmp_path / "export"
    assert {path.suffix for path in out.iterdir()} == {".pth", ".pkl", ".yaml", ".py", ".json"}

    again = mls_command("verify-export", str(out / "backbone.pkl"), "--against", str(tmp_path / "moco.pth.tar"))
    assert again.returncode == 0, again.stderr
    assert "detectron2_fpn.yaml" in again.stdout
    recipe = out / "detectron2_fpn.yaml"
    recipe.write_text(recipe.read_text().replace("FORMAT: RGB", "FORMAT: BGR"))
    wrong = mls_command("verify-export", str(out / "backbone.pkl"))
    assert wrong.returncode == 2
    progress, error = wrong.stderr.splitlines()
    assert progress == "detectron2: comparing features as detectron2_fpn.yaml makes them"
    assert error.startswith("error: backbone.pkl as detectron2_fpn.yaml uses it gives other features")


def test_what_is_no_backbone_is_one_sentence(mls_command, tmp_path: Path) -> None:
    done = mls_command("export", "resnet50")
    assert done.returncode == 2
    assert "resnet50 is neither a run folder nor a file" in done.stderr


def test_doctor_prints_the_command_for_what_is_missing(mls_command) -> None:
    done = mls_command("doctor", "--frameworks")
    assert done.returncode == 0, done.stderr
    for name, framework in frameworks.FRAMEWORKS.items():
        if frameworks.missing(name):
            assert all(command in done.stdout for command in framework.commands)
        else:
            assert f"yes  {name} {frameworks.version(name)}" in done.stdout
    assert frameworks.FRAMEWORKS["detectron2"].commands[-1] == (
        f'pip install --no-deps --no-build-isolation "{DETECTRON2}"'
    )
