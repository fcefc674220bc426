"""`mls bench downstream`, at full length: it pretrains first."""

import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_pretrained_backbone_beats_an_untrained_one(
    tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = mls_command("bench", "downstream", "--seeds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "MoCo-v2 − random" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for metric in ("scenes_objects/box_ap", "scenes_regions/miou"):
        values = {row["weights"]: row["value"] for row in rows if row["metric"] == metric}
        trained = statistics.mean(value for weights, value in values.items() if weights != "random:resnet_tiny")
        assert trained > values["random:resnet_tiny"]
