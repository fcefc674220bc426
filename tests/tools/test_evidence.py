"""`mls bench evidence`: which arms a study has, and what its tables and its picture say of numbers that are given."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mls.engine import Run
from mls.engine.events import EventLog
from mls.errors import ConfigError
from mls.eval.cells import Measured
from mls.results import Results
from mls.tools.bench.evidence import (
    ARMS,
    MOCO,
    ORACLE,
    OWN,
    QUIET,
    RANDOM,
    WINDOWS,
    arms_of,
    chosen,
    cpu_seconds,
    evidence,
    figure,
    numbers,
    share_of_gap,
    tables,
)

RECIPE = "mls_regions_scenes_tiny"
LINEAR = {MOCO: (0.60, 0.62, 0.61), WINDOWS: (0.70, 0.74, 0.72), OWN: (0.72, 0.75, 0.75), ORACLE: (0.75, 0.79, 0.78)}
OVERLAP = {OWN: 0.5, ORACLE: 0.9}


def found(linear: dict[str, tuple[float, ...]] = LINEAR) -> dict[str, dict[int, Measured]]:
    """Numbers as if they were measured, of seeds from 3 on."""

    def one(arm: str, seed: int, value: float) -> Measured:
        labels = {"overlap": OVERLAP[arm], "chance": 0.2} if arm in OVERLAP else {}
        return Measured({"linear": value, "knn": value - 0.1, **labels}, {"run": f"{arm}{seed}", "seed": seed})

    return {
        arm: {seed: one(arm, seed, value) for seed, value in enumerate(values, start=3)}
        for arm, values in linear.items()
    }


def test_arms_with_windows_share_their_start_and_differ_in_their_labels_alone() -> None:
    overrides = ["data.scenes.count=1300", "data.limit=1280"]
    arms = arms_of(RECIPE, overrides, chosen(["labels", "dense"], variants=["k 3: objective.k=3"]))
    shared = [name for name, cell in arms.items() if cell.trunk is not None]
    assert [name for name in arms if name not in shared] == ["untrained", MOCO, "supervised", "DenseCL", "SlotCon"]
    assert {arms[name].trunk_steps for name in shared} == {5 * 10}
    early = ("optim.lr=0.1", "objective.warmup_epochs=2", "objective.loss=hml objective.normalise=mean")
    early += ("objective.regions.lists=x", "objective.temperature=0.1", "objective.info_nce_weight=0.5")
    others = arms_of(RECIPE, overrides, {change: change.split() for change in early})
    assert [name for name, cell in others.items() if cell.trunk is not None] == []
    configs = {name: cell.config for name, cell in arms.items()}
    assert configs[MOCO].objective.windows.count == 0 and configs[WINDOWS].objective.method == "moco_v2"  # type: ignore[attr-defined]
    assert (configs["k 3"].objective.k, configs[OWN].objective.labels_from) == (3, "regions")  # type: ignore[attr-defined]
    trained = [str(cell.config) for cell in arms_of(RECIPE, overrides, chosen(list(ARMS))).values() if cell.trained]
    assert len(set(trained)) == len(trained)
    for name, cell in arms.items():  # equal steps, network, resolution and data
        for part in ("data", "model", "optim", "augment", "dictionary"):
            assert getattr(cell.config, part) == getattr(configs[OWN], part), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda: chosen(["label"]), "unknown question 'label': did you mean 'labels'"),
        (lambda: chosen(["labels"], only=["own"]), "unknown arm 'own'"),
        (lambda: chosen(["labels"], variants=["objective.k=3"]), "write a name, a colon and overrides"),
        (lambda: numbers("5-3"), "give how many, such as 5, or the first and the last"),
        (lambda: numbers("few"), "--seeds is 'few'"),
        (lambda: arms_of("mls_scenes_tiny", [], {}), "mls_scenes_tiny has no labels from regions"),
        (lambda: arms_of("mls_regions_coco_r50", [], {}), "mls_regions_coco_r50 trains on data.source=coco"),
    ],
)
def test_what_is_no_study_is_refused(arguments: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        arguments()


def test_tables_compare_pairs_and_say_what_share_of_the_oracle_s_gain_is_reached(tmp_path: Path) -> None:
    arms, pairs = tables(found(), tmp_path, "arm", "note")
    assert arms.texts()[2][:4] == [OWN, "3", "74.0 ± 1.7", "64.0 ± 1.7"]
    rows = dict(zip((row[0] for row in pairs.texts()), pairs.texts(), strict=True))
    assert rows["windows − MoCo-v2"][2] == "+11.0 ± 2.5"
    own = rows["own region labels − windows"]
    # By scipy.stats.ttest_rel of the two lists: t 3.4641, p 0.0742; interval 2 ± 4.3027 · 1 / √3.
    assert own[1:5] == ["3", "+2.0 ± 2.5", "0.0742", "38%"]
    assert rows["oracle labels − windows"][4] == "" and "own region labels − random labels" not in rows
    assert share_of_gap(found(), OWN, "linear") == pytest.approx(6 / 16)


def test_lists_that_a_resume_found_again_cost_their_time_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step, seconds in ((5, 20.0), (9, 30.0), (9, 10.0)):
        log.write("refresh", step=step, cpu_seconds=seconds)
    rows = [{"step": step, "epoch": 1, "cpu_seconds": seconds} for step, seconds in ((5, 1.0), (10, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert cpu_seconds(Run(tmp_path)) == 1.5 + 30 / 10


def test_a_seed_that_not_all_arms_have_counts_where_it_can(tmp_path: Path) -> None:
    _, pairs = tables(found({**LINEAR, OWN: (0.72,), RANDOM: ()}), tmp_path, "arm", "")
    rows = {row[0]: row for row in pairs.texts()}
    assert rows["own region labels − windows"][1:4] == ["1", "+2.0", ""]  # one seed: no interval, no test
    assert rows["oracle labels − windows"][1] == "3" and "random labels − windows" not in rows
    assert len(figure(found()).axes[0].texts) == 2


def test_the_command_prints_what_is_finished_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show = lambda: evidence([RECIPE], arm=[WINDOWS, OWN, ORACLE], seeds="3-4", show=True, out=tmp_path)
    with pytest.raises(ConfigError, match="has no finished arm of these: leave --show out"):
        show()
    cells = arms_of(RECIPE, QUIET, chosen(["labels"], [WINDOWS, OWN]))
    for arm, cell in cells.items():
        for seed, one in found()[arm].items():
            rows = [{"metric": f"scenes/{name}", "value": value} for name, value in one.values.items()]
            own = cell.with_seed(seed)
            facts = {"cell": own.key, "run": own.name, "seed": seed, "metrics": len(rows)}
            Results(tmp_path / "results.jsonl").add_all([{**row, **facts} for row in rows])
    show()
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "evidence.md").read_text().strip()
    assert "| own region labels − windows | 2     | +1.5 ± 6.4" in printed
    stored = json.loads((tmp_path / "evidence.json").read_text())
    assert stored[0][0]["values"] == pytest.approx([70, 74]) and (tmp_path / "gain_against_overlap.png").is_file()
