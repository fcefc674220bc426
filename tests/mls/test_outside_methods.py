"""SimSiam, BYOL and DenseCL written outside the package (tests/plugins/) train as the same methods inside do."""

from pathlib import Path

import pytest

import mls
from mls import plugins
from mls.recipes import load_config

PLUGINS = Path(__file__).parents[1] / "plugins"
OWN_KEYS = {
    "simsiam": "objective.predictor=64",
    "byol": "objective.predictor=64",
    "densecl": "objective.dense_weight=0.3",
}


@pytest.mark.parametrize("method", OWN_KEYS)
def test_a_method_from_outside_equals_the_one_inside(tiny: list[str], method: str, registries_as_before: None) -> None:
    keys = [one for one in tiny if not one.startswith("objective.")]
    keys += [OWN_KEYS[method], "monitor.log_every=1", "optim.epochs=1", "data.scenes.count=128"]
    keys += ["monitor.knn_every_epochs=0", "monitor.linear_every_epochs=0"]
    own = ["objective.in_batch_negatives=false"] if method == "densecl" else []  # which the one outside does not know
    inside = mls.pretrain(load_config("mls_scenes_tiny", [*keys, *own, f"objective.method={method}"]), quiet=True)
    plugin = plugins.load([str(PLUGINS / f"outside_{method}.py")])
    outside = mls.pretrain(load_config("mls_scenes_tiny", [*keys, f"objective.method=outside_{method}"]), quiet=True)
    losses = [[row["loss"] for row in run.metrics() if "loss" in row] for run in (inside, outside)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert outside.config.run.plugins == plugin
    assert mls.load_backbone(outside.path).feature_dim == 128
