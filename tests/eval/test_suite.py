"""Protocols and suites that ship with mls, and what a suite does: run, resume, leave out what has no data."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mls.engine import Run
from mls.errors import CheckpointError, ConfigError, DataError
from mls.eval import cells, load_protocol, load_suite, protocols, suites
from mls.eval import suite as suite_module
from mls.eval.comparison import as_tables
from mls.eval.protocol import Supervised
from mls.eval.suite import Column, Part, Row, Suite, choose, chosen_rows, on_own_data, row_of_weights
from mls.eval.weights import check_weights
from mls.recipes import load_config
from mls.results import Results
from mls.tools.submit.evaluate import plan as submitted

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"
FEW = ["data.scenes.count=80", "data.scenes.test_count=32", "training.epochs=2", "training.pseudo_from=1"]


@pytest.mark.parametrize("name", protocols())
def test_every_protocol_loads_and_names_a_known_data_set(name: str) -> None:
    from mls.core import losses
    from mls.eval import data

    protocol = load_protocol(name)
    assert protocol.data.name in data.names()
    assert protocol.task in cells.RUNNERS
    if not isinstance(protocol, Supervised):
        return
    losses.build(protocol.training.loss, **protocol.loss_options())
    for loss, options in protocol.options_of.items():
        losses.build(loss, **options)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_opens_with_purpose_command_cost_and_number(path: Path) -> None:
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = "mls eval suite" if path.parent.name == "suites" else "mls eval run"
    assert f"{command} {path.stem}" in " ".join(comment)
    assert any(line.startswith("# Cost:") for line in comment)
    assert any(line.startswith("# Expected:") for line in comment)


@pytest.mark.parametrize("name", suites())
def test_rows_of_a_suite_have_names_of_their_own(name: str) -> None:
    suite = load_suite(name)
    for tiny in (False, True):
        rows = chosen_rows(suite, (), tiny, ())
        assert len({row.name for row in rows}) == len(rows)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """The overrides that name a table of one's own labels."""
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 60, 30)).save(tmp_path / f"{number}.png")
    many = [f"{number}.png,{number % 2},{number // 2 % 2},{(number + 1) % 2}" for number in range(12)]
    (tmp_path / "many.csv").write_text("\n".join(["image,a,b,c", *many, ""]))
    one = [f"{number}.png,{'ab'[number % 2]}" for number in range(12)]
    (tmp_path / "one.csv").write_text("\n".join(["image,class", *one, ""]))
    return lambda name: ["data.name=table", f"data.labels_file={tmp_path / name}.csv"]


@pytest.mark.parametrize(
    ("name", "labels", "columns"),
    [
        ("paper_spml", "many", ["map, as VOC"]),
        ("paper_partial", "many", ["map, as VOC", "map, as VOC LI"]),
        ("paper_two_way", "many", ["map_class, as COCO class", "map_sample, as COCO sample"]),
        ("paper_classification", "many", ["map, as VOC07", "map, as VOC07 SVM"]),
        ("paper_classification", "one", ["top1, as CUB"]),
    ],
)
def test_a_papers_rows_run_on_own_labels_without_its_numbers(
    own: Callable[[str], list[str]], name: str, labels: str, columns: list[str]
) -> None:
    found = on_own_data(load_suite(name), False, own(labels))
    assert [column.name for column in found.columns] == columns
    assert not found.source and all(row.ours and not row.paper for row in found.rows)


def test_what_is_submitted_of_a_papers_suite_on_own_labels_is_what_runs_here(
    own: Callable[[str], list[str]], tmp_path: Path
) -> None:
    tasks = submitted("paper_spml", ["random:resnet_tiny"], tmp_path, seeds=1, only=["AN"], overrides=own("many"))
    assert len(tasks) == 1  # of one column, where the paper has four data sets


def test_a_suite_that_has_no_meaning_on_own_images_says_why_and_what_to_use(own: Callable[[str], list[str]]) -> None:
    for name, data, labels, words in (
        ("paper_spml", "table", "one", "measures several labels of an image, and these have one each.*: use the suite"),
        ("paper_dense", "table", "many", "measures boxes and regions.*: use the suites own_labels and"),
        ("paper_dense", "yolo", "many", "trains as long as the published sets need.*: use the protocols detection"),
        ("paper_spml", "masks", "many", "measures labels of images, so it cannot run on data.name=masks: use the prot"),
        ("frozen_dense", "coco", "many", "has no column for boxes.*: use the protocols"),
        ("paper_spml", "voc2012", "many", "leave out data.name=voc2012, or name yours"),
    ):
        with pytest.raises(ConfigError, match=words):
            on_own_data(load_suite(name), False, [f"data.name={data}", *own(labels)[1:]])
    masks = on_own_data(load_suite("frozen_dense"), False, ["data.name=masks"])
    assert [column.name for column in masks.columns][:2] == ["miou, as VOC kNN", "miou, as VOC linear"]
    with pytest.raises(ConfigError, match="--tiny is the embedded scenes, and data.name=table is not"):
        suite_module.run(load_suite("paper_spml"), Path(), Part(tiny=True, overrides=own("many")))


def test_a_suite_of_no_paper_takes_any_data_set_and_stays_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite("own_labels")
    mine = replace(suite, rows=[replace(row, paper=[1.0, 2.0, 3.0]) for row in suite.rows])
    assert all(on_own_data(mine, False, [f"data.name={name}"]) is mine for name in ("table", "folder", "voc07"))

    def nothing(planned: dict[str, list[cells.Evaluation]], *_: object) -> None:
        raise DataError(f"{planned['em'][0].protocol.data.name} is not there")

    monkeypatch.setattr(suite_module, "over_seeds", nothing)
    tiny = Part(tiny=True, only=["em"], overrides=["data.name=scenes"])
    assert suite_module.run(suite, tmp_path, tiny, lambda text: None).missing == {"mAP": "scenes is not there"}


def test_the_suite_of_single_positives_trains_on_an_own_table(own: Callable[[str], list[str]], tmp_path: Path) -> None:
    few = ["augment.size=16", "training.epochs=1", "training.precision=fp32", "model.backbone=resnet_tiny"]
    part = Part(["random:resnet_tiny"], seeds=1, only=["EM"], overrides=[*own("many"), *few, "data.workers=0"])
    found = suite_module.run(load_suite("paper_spml"), tmp_path / "runs", part, lambda text: None)
    (values,) = found.values.values()
    assert 0 <= values[0] <= 1
    (table,) = as_tables(found)
    assert [column.name for column in table.columns] == ["map, as VOC"]


def test_paper_numbers_are_those_of_the_papers_tables() -> None:
    rows = {row.name: row.paper for row in load_suite("paper_spml").rows}
    assert rows["AN"] == [85.89, 64.92, 42.27, 18.31]
    assert rows["EM + APL"] == [89.19, 70.87, 47.59, 21.84]
    assert rows["BoostLU + LL-R"] == [89.29, 72.89, 49.59, 19.8]
    assert rows["GR loss"] == [89.83, 73.17, 49.08, 21.64]
    assert rows["VLPL"] == [89.10, 71.45, 49.55, 24.02]
    assert rows["CRISP"] == [89.82, 74.64, 50.00, 21.65]
    assert rows["AEVLP"] == [90.46, 73.54, 50.70, 24.89]
    rows = {row.name: row.paper for row in load_suite("paper_hml_noise").rows}
    assert rows == {"BCE": [69.9], "Co-teaching": [70.2], "JoCoR": [70.9], "SL": [72.0], "HML": [73.5]}
    rows = {row.name: row.paper for row in load_suite("paper_openimages").rows}
    assert rows["Curriculum"] == [70.4, 71.3, 76.2, 80.5, 86.8, 77.1]
    assert rows["IMCL"] == [71.0, 72.6, 77.6, 81.8, 87.3, 78.1]
    rows = {row.name: row.paper for row in load_suite("paper_partial").rows}
    assert rows["LL-R"] == [89.2, 71.0, 47.4, 19.5, 89.4, 71.9, 49.1, 21.5]
    rows = {row.name: row.paper for row in load_suite("paper_two_way").rows}
    assert rows["Two-way, ResNet50"] == [74.11, 86.66, 51.89, 85.64, 56.42, 78.81, 72.28, 85.43]
    assert rows["ASL, RegNetY32gf"] == [76.70, 88.29, 51.03, 86.15, 57.88, 79.03, 71.11, 85.00]
    suite = load_suite("paper_dense")
    mls = next(row for row in suite.rows if row.name == "MLS")
    published = dict(zip((column.name for column in suite.columns), mls.paper, strict=True))
    assert [published[f"FPN {kind} {ap}"] for kind in ("box", "mask") for ap in ("AP", "AP50", "AP75")] == [
        *(40.5, 60.7, 44.5),
        *(36.5, 57.7, 39.1),
    ]
    assert [published[f"PSPNet {one}"] for one in ("mIoU", "mAcc", "aAcc")] == [78.5, 86.6, 96.1]
    assert [published[f"VOC {one}"] for one in ("AP", "AP50", "AP75")] == [55.0, 81.6, 61.2]


def test_columns_of_several_tables_are_printed_under_their_headings_with_the_rows_that_have_numbers() -> None:
    suite = load_suite("paper_dense")
    values = {("ours: mine", "VOC AP"): [0.5, 0.52]}
    mine = Row("ours: mine", weights="a", method="mls")
    found = suite_module.Comparison(suite, suite.columns, [*chosen_rows(suite, (), False, ()), mine], values=values)
    tables = {table.header[0]: table for table in as_tables(found)}
    assert [len(table.columns) for table in tables.values()] == [6, 6, 6, 3, 3]
    names = {heading: [row.labels[0] for row in table.rows] for heading, table in tables.items()}
    assert "LEWEL, ImageNet (paper)" in names["COCO, R50-FPN, 800 epochs (Table 1)"]
    assert names["VOC 07+12, R50-C4, 800 epochs (Table 4)"][-2:] == ["MLS (paper)", "ours: mine"]
    assert not any("mine" in name for name in names["Cityscapes (Table 3)"])
    assert tables["difference"].texts() == [["ours: mine − the paper's MLS", "-4.0", "", ""]]


def test_a_paper_s_number_without_a_method_here_is_never_run() -> None:
    for tiny in (False, True):
        rows = {row.name: row for row in chosen_rows(load_suite("paper_spml"), (), tiny, ())}
        assert not rows["VLPL"].ours and not rows["AEVLP"].ours
        assert rows["CRISP"].ours and rows["VLPL"].paper != rows["AEVLP"].paper


def test_linear_init_is_searched_over_rates_and_batches_as_published() -> None:
    (row,) = [row for row in load_suite("paper_spml").rows if row.name == "ROLE + LinearInit"]
    assert row.choose == {"training.lr": [1e-2, 1e-3, 1e-4, 1e-5], "training.batch_size": [8, 16]}
    training = load_protocol("spml_voc2012", row.set).training
    assert (training.linear_epochs, training.linear_select) == (25, "best")


def test_options_of_a_data_set_reach_the_loss() -> None:
    assert load_protocol("spml_voc2012", ["training.loss=em_apl"]).loss_options() == {"alpha": 0.2, "beta": 0.02}
    assert load_protocol("ll_cub", ["training.loss=em"]).loss_options() == {"alpha": 0.01}
    own = load_protocol("spml_cub", ["training.loss=em", "training.options.alpha=0.5"])
    assert own.loss_options() == {"alpha": 0.5}


def test_a_suite_runs_stores_every_number_and_does_not_run_it_again(tmp_path: Path) -> None:
    suite = load_suite("paper_spml")
    table = suite_module.run(suite, tmp_path, Part(tiny=True, seeds=2, only=["AN", "EM + APL"], overrides=FEW))
    assert {name: len(values) for (name, _), values in table.values.items()} == {"AN": 2, "EM + APL": 2}
    stored = Results(tmp_path / "results.jsonl").rows(metric="scenes/map")
    assert [row["seed"] for row in stored] == [0, 1] * 2
    assert stored[0]["selection"].startswith("epoch ")
    assert stored[0]["weights_hash"] and stored[0]["versions"]["torch"] == torch.__version__
    before = (tmp_path / "results.jsonl").read_bytes()
    again = suite_module.run(suite, tmp_path, Part(tiny=True, seeds=2, only=["AN", "EM + APL"], overrides=FEW))
    assert again.values == table.values
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert not list((tmp_path / "eval").iterdir())  # a suite keeps numbers, not networks


def test_a_value_is_chosen_on_the_validation_part_and_never_on_the_test(tmp_path: Path) -> None:
    column, said = Column("scenes", "spml_scenes"), []
    row = Row("AN", ["training.loss=an"], {"training.epochs": [1, 3], "training.lr": [3.0e-3, 0.0001]})
    few = [change for change in FEW if "epochs" not in change]
    found = choose(Suite(), row, column, tmp_path, few, said.append)
    rows = Results(tmp_path / "results.jsonl").rows(metric="scenes/map")
    assert len(rows) == 4
    best = max(rows, key=lambda row: row["validation"])
    protocol = load_protocol("spml_scenes", [*few, *found])
    assert cells.evaluation(protocol, "random").key == best["cell"]
    assert "best on the validation part" in said[0]
    told = choose(Suite(), row, column, tmp_path, [*few, "training.epochs=1", "training.lr=0.01"], said.append)
    assert told == [] and len(said) == 1  # what the user sets is not tried


def test_choosing_needs_a_validation_part(tmp_path: Path) -> None:
    row = Row("AN", choose={"training.lr": [0.1, 0.2]})
    overrides = [*FEW, "data.validation=0", "training.select=last"]
    with pytest.raises(ConfigError, match="no validation part to choose on"):
        choose(Suite(), row, Column("scenes", "spml_scenes"), tmp_path, overrides, print)


def test_a_cell_of_which_not_every_number_was_written_is_measured_again(tmp_path: Path) -> None:
    protocol = load_protocol("spml_scenes", FEW)
    values = cells.run(protocol, seed=3, root=tmp_path, quiet=True)
    store = tmp_path / "results.jsonl"
    torn = store.read_text()[:-30]
    store.write_text(torn)
    assert cells.run(protocol, seed=3, root=tmp_path, quiet=True) == values
    assert len(Results(store).rows(metric="scenes/map")) == 2


def test_a_column_without_its_data_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    said: list[str] = []
    table = suite_module.run(load_suite("paper_spml"), tmp_path, Part(seeds=1, only=["AN"]), said.append)
    assert table.values == {}
    assert set(table.missing) == {"VOC", "COCO", "NUS", "CUB"}
    assert "VOCdevkit" in table.missing["VOC"] and "data.root" in said[0]


def test_given_weights_stand_in_the_place_of_the_papers_networks() -> None:
    rows = chosen_rows(load_suite("paper_two_way"), ["runs/a", "runs/b"], tiny=False, only=())
    assert [row.weights for row in rows[:2]] == ["runs/a", "runs/a"]
    assert len(rows) == 2 * 9  # five losses and four single ways, each once for each of the weights
    assert len({row.name for row in rows}) == len(rows)


def test_a_trained_classifier_is_found_again(tmp_path: Path) -> None:
    protocol = load_protocol("spml_scenes", [*FEW, "training.loss=hml"])
    first = cells.trained(protocol, None, 0, tmp_path)
    again = cells.trained(protocol, None, 0, tmp_path)
    assert again is not first
    assert torch.equal(again.scores(), first.scores())


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper_spml'"):
        load_suite("paper_smpl")
    with pytest.raises(ConfigError, match="unknown row of the suite 'EMM'"):
        suite_module.run(load_suite("paper_spml"), tmp_path, Part(tiny=True, only=["EMM"]))
    (tmp_path / "mine.yaml").write_text("task: multilable\n")
    with pytest.raises(ConfigError, match="did you mean 'multilabel'"):
        load_protocol(tmp_path / "mine.yaml")
    (tmp_path / "suite.yaml").write_text(
        "columns: [{name: a, protocol: spml_scenes}]\nrows: [{name: b, paper: [1, 2]}]\n"
    )
    with pytest.raises(ConfigError, match="2 paper numbers for 1 columns"):
        load_suite(tmp_path / "suite.yaml")
    with pytest.raises(DataError, match="nothere"):
        cells.run(load_protocol("spml_voc2012", [f"data.root={tmp_path / 'nothere'}"]), "random", root=tmp_path)


def test_rows_of_a_missing_library_and_columns_of_more_clusters_than_patches_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    few = ["data.scenes.count=20", "data.scenes.test_count=5", "features.device=cpu"]
    told: list[str] = []
    suite = load_suite("scenes_frozen_dense")
    part = Part(seeds=1, only=["random", "random, ViT"], overrides=few)
    found = suite_module.run(suite, tmp_path, part, told.append)
    assert found.absent == {"random, ViT": 'vit_tiny_patch16_224 is a network of timm: pip install "mls[timm]"'}
    assert found.missing == {"500 clusters mIoU": "the test images have fewer than 500 patches"}
    assert len(told) == 2 and ("random", "clusters mIoU") in found.values


def test_a_run_that_has_still_to_train_is_a_row_of_its_method(tmp_path: Path) -> None:
    """Its evaluations are queued behind it."""
    run = Run.create(load_config("moco_v2_scenes_tiny", [f"run.root={tmp_path}", "run.name=later"]))
    row = row_of_weights("later", str(run.path))
    assert (row.weights, row.method) == (str(run.path), "moco_v2")
    with pytest.raises(CheckpointError, match="later holds no backbone.safetensors"):
        check_weights(str(run.path))
