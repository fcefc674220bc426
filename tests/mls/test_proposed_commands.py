"""Commands and overrides that sentences propose can be pasted, whatever the texts in them hold."""

from pathlib import Path

import pytest

from mls.engine import Run, verify
from mls.engine.run import refuse_another_configuration
from mls.errors import CheckpointError, of_the_machine
from mls.recipes import is_override, load_config, override


@pytest.mark.parametrize("text", ["photos", "birds #1", "a: b", "[x]", "010", "null", "é 📷", "k=5", "", "{a}", "- x"])
def test_a_text_arrives_as_it_is(text: str) -> None:
    assert load_config("mls_folder_r50", [override("data.root", text)]).data.root == text


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "k=5").mkdir()
    assert not is_override(str(tmp_path / "k=5"))
    assert is_override("objective.k=5")


def test_a_key_that_the_new_method_has_not_is_no_override(tmp_path: Path) -> None:
    first = load_config("mls_scenes_tiny", [f"run.root={tmp_path}", "run.name=first"])
    run = Run.create(first)
    with pytest.raises(CheckpointError, match=r"--from-step 5 objective\.method=moco_v2") as refused:
        refuse_another_configuration(first, load_config("moco_v2_scenes_tiny", ["run.name=first"]), run, 5)
    command = str(refused.value).partition("go on from there")[2]
    assert "not a key" not in command


def test_a_run_that_is_opened_from_inside_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Run.create(load_config("mls_scenes_tiny", [f"run.root={tmp_path}", "run.name=inside"]))
    monkeypatch.chdir(made.path)
    assert Run.open(".").name == "inside"


def test_a_file_in_the_way_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for made in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file") as caught:
            made.mkdir()
        assert "a file is in the way, so name another folder" in str(of_the_machine(caught.value))


def test_an_exact_resume_is_verified_from_saved_steps_in_recipes_that_size_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_train", lambda *given: None)
    monkeypatch.setattr(verify, "compare", lambda *runs: [])
    config = load_config("mls_folder_r50", ["data.root=images"])
    assert "engine.checkpoint_every" in config.run.auto
    verify.verify(config, tmp_path, steps=40)
    for name in ("undisturbed", "disturbed"):
        made = load_config(tmp_path / name / "config.yaml")
        assert made.engine.checkpoint_every == 10
        assert set(config.run.auto) - set(made.run.auto) == {"engine.checkpoint_every"}
