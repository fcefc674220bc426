"""`mls results` as a user calls it, on stores that mls.results.Results has written."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from mls.results import Results
from mls.tables import as_csv, escaped
from mls.tools import results
from mls.tools.cli import app

Command = Callable[..., subprocess.CompletedProcess[str]]
Show = Callable[..., Result]


def add_cell(store: Results, values: dict[str, float], seed: int = 0, **fields: Any) -> None:
    """The rows of one cell as mls.eval writes them."""
    row = {"protocol": "linear_voc07", "weights": "random", "duration": 30.0, "versions": {"mls": "0.1.0"}} | fields
    cell = fields.get("cell", f"{row['protocol']}-{row.get('loss')}-{row['weights']}-{seed}")
    row |= {"seed": seed, "cell": cell, "run": f"run-{cell}", "metrics": len(values)}
    store.add_all([{"metric": metric, "value": value, **row} for metric, value in values.items()])


@pytest.fixture
def store(tmp_path: Path) -> Results:
    return Results(tmp_path / "results.jsonl")


@pytest.fixture
def show(tmp_path: Path) -> Show:
    def call(*arguments: str) -> Result:
        done = CliRunner().invoke(app, ["results", *arguments], env={"MLS_RUNS": str(tmp_path)}, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return done

    return call


def lines_of(markdown: str) -> list[dict[str, str]]:
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    return [dict(zip(table[0], line, strict=True)) for line in table[2:]]


def test_a_line_for_each_protocol_and_weights_with_mean_and_std_over_seeds(store: Results, show: Show) -> None:
    for seed, value in enumerate((0.50, 0.52, 0.54)):
        add_cell(store, {"voc07/map": value, "voc07/map_11pt": value - 0.1}, seed)
    add_cell(store, {"voc07/map": 0.9}, weights="runs/mls")
    done = show()
    assert done.stderr == ""
    header = ["protocol", "weights", "voc07/map", "voc07/map_11pt", "runs", "time"]
    assert [list(line.values()) for line in lines_of(done.stdout)] == [
        ["linear_voc07", "random", "52.00 ± 2.00", "42.00 ± 2.00", "3", "1:30"],
        ["linear_voc07", "runs/mls", "90.00", "", "1", "0:30"],
    ]
    assert list(lines_of(done.stdout)[0]) == header


def test_a_folder_is_named_and_one_of_before_is_of_unknown_data(store: Results, show: Show) -> None:
    common = {"protocol": "knn", "dataset": "folder", "loss": None}
    add_cell(store, {"folder/top1": 0.9}, cell="0", **common)
    for number, root in enumerate(("/data/ants", "/data/bees", "/data/bees")):
        fields = {"root": root, "content": f"{number}{number}abcdef0123"}
        add_cell(store, {"folder/top1": number / 10}, cell=f"of {number}", **common, **fields)
    lines = lines_of(show("--long").stdout)
    assert [(line["data"], line["folder/top1"]) for line in lines] == [
        ("ants", "0.00"),
        ("bees 11abcd", "10.00"),
        ("bees 22abcd", "20.00"),
        ("unknown", "90.00"),
    ]
    assert [line["data"] for line in lines_of(show("root=*ants").stdout)] == ["ants"]


def test_two_folders_of_one_name_are_two_rows(store: Results, show: Show) -> None:
    for seed, root in enumerate(("/a/birds", "/b/birds")):
        fields = {"dataset": "folder", "root": root, "content": f"{seed}{seed}abcdef"}
        add_cell(store, {"folder/top1": 0.5 + seed / 10}, seed, cell=root, **fields)
    lines = lines_of(show().stdout)
    assert [(line["data"], line["folder/top1"]) for line in lines] == [
        ("birds 00abcd", "50.00"),
        ("birds 11abcd", "60.00"),
    ]


def test_weights_that_were_replaced_are_never_averaged_with_the_new_ones(store: Results, show: Show) -> None:
    for seed in (0, 1):
        place = {"step": 100, "weights_hash": f"{seed}{seed}abcdef"}
        add_cell(store, {"voc07/map": 0.5 + seed / 10}, seed, weights="runs/mls", **place)
        add_cell(store, {"voc07/map": 0.2}, seed, weights="pretrain:mls_coco_r50", **place)  # a run for each seed
    lines = lines_of(show().stdout)
    assert [(line["weights"], line["voc07/map"]) for line in lines] == [
        ("pretrain:mls_coco_r50", "20.00 ± 0.00"),
        ("runs/mls 00abcd", "50.00"),
        ("runs/mls 11abcd", "60.00"),
    ]


def test_two_steps_of_a_run_are_two_rows(store: Results, show: Show) -> None:
    for step, value in ((100, 0.5), (200, 0.6)):
        add_cell(store, {"voc07/map": value}, weights="runs/mls", cell=str(step), step=step)
    lines = lines_of(show().stdout)
    assert [(line["weights"], line["step"], line["voc07/map"]) for line in lines] == [
        ("runs/mls", "100", "50.00"),
        ("runs/mls", "200", "60.00"),
    ]


def test_random_networks_that_were_stored_under_a_published_name_are_called_random(store: Results, show: Show) -> None:
    add_cell(store, {"voc07/map": 0.1}, weights="timm:resnet50d")
    add_cell(store, {"voc07/map": 0.9}, weights="timm:resnet50d", cell="new", content="0123")
    lines = lines_of(show().stdout)
    assert {line["weights"]: line["voc07/map"] for line in lines} == {
        "random:timm:resnet50d": "10.00",
        "timm:resnet50d": "90.00",
    }


def test_losses_are_never_averaged_together(store: Results, show: Show) -> None:
    add_cell(store, {"scenes/map": 0.2}, 0, loss="an")
    add_cell(store, {"scenes/map": 0.8}, 1, loss="em")
    assert [(line["loss"], line["scenes/map"]) for line in lines_of(show().stdout)] == [
        ("an", "20.00"),
        ("em", "80.00"),
    ]


def test_settings_tell_runs_apart_only_where_there_are_several(store: Results, show: Show) -> None:
    add_cell(store, {"scenes/map": 0.2}, 0, settings="aaaa", cell="1")
    add_cell(store, {"scenes/map": 0.4}, 1, settings="aaaa", cell="2")
    assert [line["scenes/map"] for line in lines_of(show().stdout)] == ["30.00 ± 14.14"]
    assert "settings" not in show().stdout
    add_cell(store, {"scenes/map": 0.9}, 0, settings="bbbb", cell="3")
    lines = lines_of(show().stdout)
    assert [(line["settings"], line["scenes/map"]) for line in lines] == [("aaaa", "30.00 ± 14.14"), ("bbbb", "90.00")]


def test_cells_of_one_seed_that_nothing_tells_apart_are_not_averaged(store: Results, show: Show) -> None:
    add_cell(store, {"scenes/map": 0.2}, 0, cell="1")
    add_cell(store, {"scenes/map": 0.8}, 0, cell="2")
    done = show()
    found = [(line["run"], line["scenes/map"]) for line in lines_of(done.stdout)]
    assert found == [("run-1", "20.00"), ("run-2", "80.00")]
    assert re.fullmatch(r"not averaged, .*: linear_voc07, random\n", done.stderr)


def test_of_a_cell_that_was_measured_again_the_newest_numbers_count(store: Results, show: Show) -> None:
    add_cell(store, {"voc07/map": 0.1})
    add_cell(store, {"voc07/map": 0.3}, 1)
    add_cell(store, {"voc07/map": 0.2})
    assert [line["voc07/map"] for line in lines_of(show().stdout)] == ["25.00 ± 7.07"]
    assert [row["value"] for row in json.loads(show("--format", "json").stdout)] == [0.2, 0.3]


def test_long_shows_every_run(store: Results, show: Show) -> None:
    for seed in range(3):
        add_cell(store, {"voc07/map": seed / 10}, seed)
    lines = lines_of(show("--long").stdout)
    assert [line["voc07/map"] for line in lines] == ["0.00", "10.00", "20.00"]
    assert len({line["run"] for line in lines}) == 3


def test_filters_on_one_field_add_up_and_on_different_fields_all_hold(store: Results, show: Show) -> None:
    for weights in ("random", "runs/mls-a", "runs/mls-b"):
        add_cell(store, {"voc07/map": 0.1, "voc07/map_11pt": 0.2, "voc07/f1": 0.3}, weights=weights)
    found = json.loads(show("metric=*/map", "metric=*/f1", "weights=*mls*", "seed=0", "--format", "json").stdout)
    assert {(row["weights"], row["metric"]) for row in found} == {
        (weights, metric) for weights in ("runs/mls-a", "runs/mls-b") for metric in ("voc07/map", "voc07/f1")
    }
    assert len(json.loads(show("versions.mls=0.1*", "--format", "json").stdout)) == 9


def test_weights_with_brackets_are_found_by_their_own_name(store: Results, show: Show) -> None:
    weights = "pretrain:mls_scenes_tiny optim.steps=[60,80]"
    add_cell(store, {"scenes/map": 0.5}, weights=weights)
    assert lines_of(show(f"weights={weights}").stdout)[0]["weights"] == weights


def test_by_weights_sets_protocols_side_by_side(store: Results, show: Show) -> None:
    for weights, shift in (("random", 0.0), ("runs/mls", 0.1)):
        add_cell(store, {"voc07/map": 0.5 + shift}, protocol="linear_voc07", weights=weights)
        add_cell(store, {"voc07/map": 0.6 - shift}, protocol="svm_voc07", weights=weights)
    linear, svm = "linear_voc07 voc07/map", "svm_voc07 voc07/map"  # one metric, two protocols: never one column
    assert lines_of(show("--by", "weights", "--bold").stdout) == [
        {"weights": "random", linear: "50.00", svm: "**60.00**", "runs": "1", "time": "1:00"},
        {"weights": "runs/mls", linear: "**60.00**", svm: "50.00", "runs": "1", "time": "1:00"},
    ]
    only = show("--by", "weights", "protocol=svm*")
    assert list(lines_of(only.stdout)[0]) == ["weights", "voc07/map", "runs", "time"]
    assert "; protocol svm_voc07." in only.stdout


def test_of_too_many_metrics_each_data_set_keeps_its_first_and_the_others_are_named(store: Results, show: Show) -> None:
    for name in "abcdef":
        add_cell(store, {f"{name}/top1": 0.5, f"{name}/top5": 0.9}, protocol=f"linear_{name}")
    done = show("--by", "weights", "weights=random")
    assert sum("top1" in name for name in lines_of(done.stdout)[0]) == 6
    assert len(lines_of(done.stdout)[0]) == 8 + len(["weights", "runs", "time"])
    left_out = re.fullmatch(r"left out (.*): choose columns with a filter, for example '(metric=.*)'\n", done.stderr)
    assert left_out[1].count("top5") == 4
    assert left_out[2].removeprefix("metric=") in lines_of(show(left_out[2]).stdout)[0]


def test_a_metric_that_is_not_a_number_is_shown_and_never_the_best(store: Results, show: Show) -> None:
    add_cell(store, {"scenes/map_g1": float("nan")}, 0)
    add_cell(store, {"scenes/map_g1": 0.5}, 1)
    add_cell(store, {"scenes/map_g1": 0.4}, weights="runs/mls")
    assert [line["scenes/map_g1"] for line in lines_of(show("--bold").stdout)] == ["nan", "**40.00**"]


def test_csv_and_json_hold_every_number_with_all_its_fields(store: Results, show: Show) -> None:
    weights, value = 'runs/"a", b', 0.1 + 0.2
    add_cell(store, {"voc07/map": value, "voc07/f1": 1 / 3}, weights=weights, validation=None)
    table = list(csv.DictReader(io.StringIO(show("--format", "csv").stdout)))
    assert [(row["metric"], float(row["value"])) for row in table] == [("voc07/map", value), ("voc07/f1", 1 / 3)]
    assert {(row["weights"], row["seed"], row["validation"], row["versions.mls"]) for row in table} == {
        (weights, "0", "", "0.1.0")
    }
    assert json.loads(show("--format", "json").stdout) == store.rows()


@given(st.lists(st.dictionaries(st.sampled_from(["weights", "run"]), st.text("a,\"'\n; é|"), min_size=1)))
def test_csv_is_read_back_as_it_was(rows: list[dict[str, str]]) -> None:
    found = list(csv.DictReader(io.StringIO(as_csv(rows, ["metric", "weights", "run"]), newline="")))
    assert found == [{"metric": "", "weights": "", "run": ""} | row for row in rows]


def test_latex_is_a_booktabs_table_of_the_same_texts(store: Results, show: Show) -> None:
    for seed in range(2):
        add_cell(store, {"voc07/map_11pt": 0.5 + seed / 10, "voc07/f1": 0.5}, seed, weights="runs/50%_a&b")
    add_cell(store, {"voc07/map_11pt": 0.4})
    lines = show("--format", "latex", "--bold").stdout.splitlines()
    assert lines[0].startswith("% In per cent, mean ± std over the runs.")
    assert lines[1:] == [
        r"\begin{tabular}{llrrrr}",
        r"\toprule",
        r"protocol & weights & voc07/map\_11pt & voc07/f1 & runs & time \\",
        r"\midrule",
        r"linear\_voc07 & random & 40.00 &  & 1 & 0:30 \\",
        r"linear\_voc07 & runs/50\%\_a\&b & \textbf{55.00 $\pm$ 7.07} & \textbf{50.00 $\pm$ 0.00} & 2 & 1:00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@given(st.text("ab/ \\&%$#_{}~^±"))
def test_escaped_text_means_the_same_in_latex(text: str) -> None:
    written = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"$\pm$": "±"}
    written |= {f"\\{sign}": sign for sign in "&%$#_{}"}
    pieces = re.findall("|".join(map(re.escape, written)) + "|[ab/ ]", escaped(text))
    assert "".join(pieces) == escaped(text)  # nothing is left that LaTeX would take for a command
    assert "".join(written.get(piece, piece) for piece in pieces) == text


def test_a_torn_line_is_left_out_and_counted(store: Results, show: Show) -> None:
    add_cell(store, {"voc07/map": 0.5})
    with open(store.path, "a") as file:
        file.write(store.path.read_text()[:40])  # a writer that was killed half-way
    add_cell(store, {"voc07/map": 0.7}, 1)
    done = show()
    assert lines_of(done.stdout)[0]["voc07/map"] == "60.00 ± 14.14"
    assert re.fullmatch(r".*results\.jsonl: left out line 2 \(no row: its writer was killed, .*\)\n", done.stderr)


def test_nothing_is_lost_where_two_write_at_once(store: Results, show: Show) -> None:
    code = (
        "import sys; from mls.results import Results\n"
        "for seed in range(40): Results(sys.argv[1]).add("
        "metric='voc07/map', value=0.5, cell=f'{sys.argv[2]}{seed}', weights=sys.argv[2] * 3000, seed=seed)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(store.path), name]) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    done = show("--format", "json")
    assert done.stderr == ""
    found = [(row["weights"], row["seed"]) for row in json.loads(done.stdout)]
    assert sorted(found) == [(name * 3000, seed) for name in "ab" for seed in range(40)]


def test_where_nothing_matches_a_sentence_says_what_there_is(store: Results, show: Show) -> None:
    add_cell(store, {"voc07/map": 0.5})
    add_cell(store, {"voc07/map": 0.5}, 1, weights="runs/mls")
    done = show("weights=runs/moco")
    assert (done.stdout, done.stderr) == ("", "no result has weights=runs/moco: there are random, runs/mls\n")
    assert show("weights=random", "seed=1").stderr.startswith("none of the 2 results matches all of these together")
    assert json.loads(show("weights=runs/moco", "--format", "json").stdout) == []
    assert show("weights=runs/moco", "--format", "csv").stdout.startswith("metric,value,")


def test_a_store_without_numbers_of_a_protocol_says_who_stores_them(store: Results, show: Show) -> None:
    store.add(cell="MLS", seed=0, linear=51.0)  # a row of a study under `mls bench`
    done = show()
    assert done.stdout == ""
    assert "holds no numbers of a protocol: `mls eval run`" in done.stderr


def test_a_store_is_named_by_its_folder_or_its_file(store: Results, show: Show, tmp_path: Path) -> None:
    add_cell(store, {"voc07/map": 0.5})
    moved = store.path.rename(tmp_path / "of_march.jsonl")
    assert lines_of(show("--store", str(moved)).stdout)[0]["voc07/map"] == "50.00"
    moved.rename(tmp_path / "results.jsonl")
    assert lines_of(show("--store", str(tmp_path)).stdout)[0]["voc07/map"] == "50.00"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--store", "nowhere"], r"there are no results in nowhere: run `mls eval run` first, .*"),
        (["metrc=*/map"], r"unknown field 'metrc': did you mean 'metric'\? .*"),
        (["map"], r"'map' is not KEY=VALUE: name the field it is about, for example 'metric=\*map\*'"),
        (["--by", "wieghts"], r"unknown field for --by 'wieghts': did you mean 'weights'\? .*"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, store: Results, mls_command: Command
) -> None:
    add_cell(store, {"voc07/map": 0.5})
    done = mls_command("results", *arguments, MLS_RUNS=str(store.path.parent))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: {sentence}\n", done.stderr)


def test_a_look_at_the_results_needs_no_torch(store: Results) -> None:
    add_cell(store, {"voc07/map": 0.5})
    code = "import sys; from mls.tools.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "results", "--store", str(store.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_store_is_read_once_and_then_only_what_was_appended(store: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(50):
        add_cell(store, {"voc07/map": seed / 100, "voc07/f1": 0.5}, seed, cell=f"cell{seed}")
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    for seed in range(50):
        found = store.cell(f"cell{seed}")
        assert found is not None and found.values == {"voc07/map": seed / 100, "voc07/f1": 0.5}
    assert store.cell("of nobody") is None
    assert len(parsed) == 100 + 2 * 50
    add_cell(Results(store.path), {"voc07/map": 0.9}, cell="new")
    found = store.cell("new")
    assert found is not None and found.values == {"voc07/map": 0.9}
    assert len(parsed) == 200 + 1 + 1


def test_a_store_that_was_replaced_or_is_torn_is_not_answered_from_memory(store: Results, tmp_path: Path) -> None:
    add_cell(store, {"voc07/map": 0.1, "voc07/f1": 0.2}, cell="a")
    assert store.cell("a") is not None
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-30])  # its writer was killed
    assert store.cell("a") is None
    store.path.write_bytes(whole.replace(b"0.1,", b"0.7,"))  # changed by hand: its check does not hold
    assert store.cell("a") is None
    add_cell(Results(tmp_path / "other.jsonl"), {"voc07/map": 0.3}, cell="b")
    (tmp_path / "other.jsonl").replace(store.path)
    assert store.cell("a") is None
    assert (found := store.cell("b")) is not None and found.values == {"voc07/map": 0.3}


def test_many_different_weights_take_time_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in looks at a field, not in seconds."""
    looks = []
    text_of = results.text_of
    monkeypatch.setattr(results, "text_of", lambda row, key: looks.append(key) or text_of(row, key))
    counts = []
    for many in (100, 400):
        looks.clear()
        row = {"metric": "voc07/map", "value": 0.5, "dataset": "folder", "protocol": "linear", "step": 1, "seed": 0}
        rows = [{**row, "cell": n, "weights": f"w{n}", "weights_hash": str(n), "root": f"/r{n}/d"} for n in range(many)]
        assert len(results.averaged(rows, long=False)) == many
        counts.append(len(looks))
    assert counts[1] == 4 * counts[0]
