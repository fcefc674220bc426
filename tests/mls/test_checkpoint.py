import errno
import os
from pathlib import Path

import pytest
import torch

from mls.engine.checkpoint import Checkpoints, read
from mls.errors import CheckpointError, UserError
from mls.files import atomic_file, write_atomically


def state(step: int) -> dict:
    return {"step": step, "tensor": torch.arange(step + 1)}


def test_keeps_the_last_n_and_all_milestones(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 7):
        store.save(step, state(step), milestone=step == 2)
    assert store.steps() == [2, 5, 6]
    assert len(list(tmp_path.iterdir())) == 6


def test_loads_with_weights_only(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, 1).save(3, state(3))
    assert torch.load(path, weights_only=True)["step"] == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_broken_newest_file_falls_back_to_the_one_before_and_says_so(tmp_path: Path, damage: str) -> None:
    store = Checkpoints(tmp_path, keep_last=2)
    store.save(1, state(1))
    newest = store.save(2, state(2))
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
    newest.write_bytes({"truncate": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    said: list[str] = []
    found = store.newest(warn=said.append)
    assert found is not None
    assert found["step"] == 1
    assert "step-00000002.pt" in said[0]
    assert "going back" in said[0]


def test_all_broken_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "new", keep_last=2)
    assert store.newest() is None
    store.save(1, state(1)).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        store.newest(warn=lambda text: None)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"step": 1, "evil": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError):
        read(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")
    with pytest.raises(UserError, match="no disk space left for .*file: free some"), atomic_file(target) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_system_error_behind_torchs_own_is_found(tmp_path: Path, error: int) -> None:
    def save() -> None:
        try:
            raise OSError(error, os.strerror(error))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 105728 vs 105624")

    sentence = "cannot write" if error == errno.EACCES else "no disk space left"
    with pytest.raises(UserError, match=sentence), atomic_file(tmp_path / "file"):
        save()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_torch_save_on_a_full_device_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *a, **k: real_open("/dev/full" if ".tmp" in str(path) else path, *a, **k)
    )
    with pytest.raises(UserError, match="no disk space left"):
        Checkpoints(tmp_path, 1).save(1, {"tensor": torch.zeros(1_000_000)})
