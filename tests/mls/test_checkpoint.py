import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mls.engine.checkpoint import Checkpoints, non_finite, read
from mls.errors import CheckpointError, UserError
from mls.files import atomic_file, sha256, write_atomically


def state(step: int) -> dict:
    return {"step": step, "tensor": torch.arange(step + 1)}


def test_keeps_the_last_n_and_all_milestones(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 7):
        store.save(step, state(step), milestone=step == 2)
    assert store.steps() == [2, 5, 6]
    assert len(list(tmp_path.iterdir())) == 3


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


def test_a_checkpoint_of_version_0_1_is_checked_by_what_lies_beside_it_or_by_its_archive(tmp_path: Path) -> None:
    path, said = tmp_path / "step-00000003.pt", list[str]()
    torch.save(state(3), path)
    path.with_suffix(".json").write_text(json.dumps({"sha256": sha256(path), "milestone": True}))
    assert read(path, said.append)["step"] == 3 and said == []
    store = Checkpoints(tmp_path, keep_last=1)
    store.save(4, state(4))
    store.save(5, state(5))
    assert store.steps() == [3, 5]  # it is still a milestone
    path.with_suffix(".json").unlink()
    assert read(path, said.append)["step"] == 3 and "only the archive's own checksums were checked" in said.pop()
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.arange(4).numpy().tobytes(), torch.arange(1, 5).numpy().tobytes()))
    with pytest.raises(CheckpointError, match="damaged"):
        read(path, said.append)


def test_where_a_state_is_not_finite_is_named_and_unknown_boxes_are_no_fault() -> None:
    good = {"half": torch.ones(3, dtype=torch.bfloat16), "ids": torch.arange(3), "none": torch.empty(0), "step": 3}
    good["dictionary"] = {"boxes": torch.full((2, 4), torch.nan), "rows": torch.ones(2, 3)}
    assert list(non_finite(good)) == []
    bad = {**good, "norm": {"variance": torch.tensor([1.0, torch.inf])}, "half": good["half"] * torch.nan}
    assert list(non_finite(bad)) == ["half", "norm.variance"]


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
