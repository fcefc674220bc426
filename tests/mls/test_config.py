from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mls.config import Config, differences, flatten, to_dict, to_yaml
from mls.errors import ConfigError
from mls.eval.cells import config_hash
from mls.recipes import from_dict, load_config, recipes, resolve


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_opens_with_purpose_and_command(name: str) -> None:
    import mls.configs

    config = load_config(name)
    text = (Path(next(iter(mls.configs.__path__))) / "pretrain" / f"{name}.yaml").read_text()
    assert config.run.recipe == name
    assert text.startswith("# ")
    assert f"pretrain {name}" in text.split("\ndata:")[0]
    assert "Cost:" in text
    assert "Expected:" in text


def test_defaults_are_the_papers() -> None:
    config = Config()
    assert (config.objective.k, config.dictionary.size, config.objective.temperature) == (20, 4096, 0.2)
    assert (config.objective.weight, config.model.momentum, config.model.projection) == (0.5, 0.995, 256)
    assert (config.optim.lr, config.optim.weight_decay, config.data.batch_size) == (0.3, 1e-4, 256)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objektive.k=3", "unknown key 'objektive' in the command line: did you mean 'objective'?"),
        ("objective.topk=3", "did you mean 'objective.k'?"),
        ("seed=3", "did you mean 'run.seed'?"),
        ("data.workes=2", "did you mean 'data.workers'?"),
        ("objective.k=abc", "objective.k=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        ("objective.normalise=maen", "expected one of ['mean', 'positives', 'balanced']"),
        ("augment.scale=[1,2,3]", "augment.scale=[1,2,3]: "),
        ("objective=3", "'objective' in the command line is a section"),
        ("objective.k=[", "'objective.k=[' is not valid YAML"),
        ("k", "'k' is not an override: write key=value"),
        ("dictionary.size=64", "dictionary.size 64 is smaller than the batch 128: raise dictionary.size"),
        ("objective.k=5000", "objective.k 5000 is larger than dictionary.size 2048: lower objective.k"),
        ("engine.max_steps=0", "engine.max_steps is 0: it must be greater than 0"),
        ("engine.accumulate=3", "data.batch_size 128 does not divide into engine.accumulate 3"),
        ("objective.temperature=0", "objective.temperature is 0.0: it must be greater than 0"),
        ("augment.flip=1.5", "augment.flip is 1.5: it must lie between 0 and 1"),
        ("augment.scale=[0.9,0.1]", "augment.scale is [0.9, 0.1]: it must be two rising numbers"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_fix(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("mls_scenes_tiny", [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mls_scenes_tiny'"):
        load_config("mls_scene_tiny")


def test_a_recipe_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [1,\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken)
    broken.write_text("data:\n  bach_size: 3\n")
    with pytest.raises(
        ConfigError, match=r"unknown key 'data.bach_size' in broken\.yaml: did you mean 'data.batch_size'"
    ):
        load_config(broken)


def test_every_value_says_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: moco_v2_scenes_tiny\ndata:\n  batch_size: 64\n")
    resolved = resolve(tmp_path / "mine.yaml", ["optim.lr=0.1"])
    assert resolved.config.data.batch_size == 64
    assert resolved.config.objective.method == "moco_v2"
    assert resolved.origins["data.batch_size"] == "mine.yaml:3"
    assert resolved.origins["objective.method"].startswith("moco_v2_scenes_tiny.yaml:")
    assert resolved.origins["augment.size"].startswith("mls_scenes_tiny.yaml:")
    assert resolved.origins["optim.lr"] == "override"
    assert resolved.origins["optim.momentum"] == "default"
    assert set(resolved.origins) == {key for key, _ in flatten(resolved.config)}


def test_differences_name_key_and_both_values() -> None:
    first, second = load_config("mls_scenes_tiny"), load_config("mls_scenes_tiny", ["objective.k=7"])
    assert differences(first, second) == [("objective.k", 20, 7)]
    assert differences(first, first) == []


def test_differences_of_two_methods_are_its_name_and_what_was_chosen() -> None:
    first = load_config("mls_scenes_tiny", ["objective.k=7", "objective.regions.grid=3"])
    second = load_config("moco_v2_scenes_tiny", ["objective.temperature=0.1"])
    rows = {key: values for key, *values in differences(first, second) if key.startswith("objective.")}
    assert rows == {
        "objective.method": ["mls", "moco_v2"],
        "objective.k": [7, "not a key"],
        "objective.warmup_epochs": [3.0, "not a key"],
        "objective.temperature": [0.2, 0.1],
    }


@settings(max_examples=25)
@given(
    k=st.integers(1, 100),
    lr=st.floats(1e-6, 10, allow_nan=False),
    name=st.none() | st.text("abcdefgh-_1.", min_size=1, max_size=8),
    options=st.dictionaries(st.sampled_from(["alpha", "beta"]), st.floats(0, 1)),
)
def test_a_configuration_survives_yaml(k: int, lr: float, name: str | None, options: dict[str, float]) -> None:
    import tempfile
    from dataclasses import replace

    base = Config()
    config = replace(
        base,
        run=replace(base.run, name=name),
        optim=replace(base.optim, lr=lr),
        objective=replace(base.objective, k=k, options=options),
    )
    assert from_dict(to_dict(config)) == config
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(to_yaml(config))
        file.flush()
        assert load_config(file.name) == config


def test_a_configuration_that_version_0_1_stored_is_read(tmp_path: Path) -> None:
    """It held the keys of all methods, whatever the run's own was."""
    values = yaml.safe_load(to_yaml(load_config("moco_v2_scenes_tiny", ["run.name=old"])))
    values["objective"] |= {"k": 20, "weight": 0.5, "loss": "bce", "options": {}, "pseudo_labels": "matched"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "config.yaml") == load_config("moco_v2_scenes_tiny", ["run.name=old"])
    assert from_dict(values) == load_config("moco_v2_scenes_tiny", ["run.name=old"])
    with pytest.raises(ConfigError, match=r"moco_v2 has no objective.k"):
        load_config(tmp_path / "config.yaml", ["objective.k=5"])


def test_a_run_that_was_made_before_views_came_from_workers_goes_on_as_it_began(tmp_path: Path) -> None:
    values = to_dict(load_config("mls_folder_r50", ["run.name=old"]))
    assert values["engine"].pop("augment") == "auto"
    assert from_dict(values).engine.augment == "device"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "config.yaml").engine.augment == "device"
    assert load_config(tmp_path / "config.yaml", ["engine.augment=worker"]).engine.augment == "worker"
    scenes = load_config("mls_scenes_tiny")
    without = {**to_dict(scenes), "engine": {k: v for k, v in to_dict(scenes)["engine"].items() if k != "augment"}}
    assert config_hash(from_dict(without)) == config_hash(scenes), "stored results are found again"
