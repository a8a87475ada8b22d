"""The claims script: a grid of equal cost, resumed and budgeted, and verdicts that follow the numbers."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import one_torch_thread

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import claims
from claims_verdicts import HOLDS, NOT, OPEN, PART, Cell, Run, seconds_to, spread, verdicts

from fastssl.errors import UserError
from fastssl.losses.barlow_twins import redundancy_rule
from fastssl.recipe.load import load

GRID = claims.Grid((64, 256, 1024), (2, 4, 8, 16), (1.0, 0.5, 0.25, 0.125), 256)
REFERENCE = GRID.reference
REFERENCE_OF_16 = dataclasses.replace(REFERENCE, dim=16)


@pytest.fixture
def one_thread():
    with one_torch_thread():
        yield


def runs(final: float, *, epochs: float = 8, seconds: float = 100, start: float = 20) -> list[Run]:
    """Three seeds around a final accuracy, on a curve that rises evenly from the start."""
    found = []
    for seed, off in enumerate((-0.2, 0.0, 0.2)):
        steps = [i / 4 for i in range(1, 5)]
        curve = [(epochs * p, 1000 * p, seconds * p, start + (final + off - start) * p) for p in steps]
        found.append(Run(seed, final + off, seconds, curve))
    return found


def story(**finals: float) -> dict[Cell, list[Run]]:
    """Finished runs by short names: d64, d64_fixed, v4, v8, v8_quarter, v2_quarter, v2, ref."""
    cells = {
        "ref": REFERENCE,
        "d64": Cell(2, 64, "scaled", 1.0),
        "d64_fixed": Cell(2, 64, "fixed", 1.0),
        "v2": Cell(2, 256, "scaled", 1.0),
        "v2_fixed": Cell(2, 256, "fixed", 1.0),
        "v4": Cell(4, 256, "scaled", 1.0),
        "v8": Cell(8, 256, "scaled", 1.0),
        "v8_quarter": Cell(8, 256, "scaled", 0.25),
        "v2_quarter": Cell(2, 256, "scaled", 0.25),
    }
    return {cells[k]: runs(v, epochs=16 / (cells[k].views * cells[k].fraction)) for k, v in finals.items()}


def outcome(claim: str, found: dict[Cell, list[Run]]) -> tuple[str, str]:
    said = next(v for v in verdicts(found, REFERENCE, 256) if v["claim"].startswith(claim))
    return said["outcome"], said["text"]


def test_the_grid_holds_each_cell_once_and_the_most_telling_first():
    cells = claims.cells(GRID)
    assert len(set(cells)) == len(cells)
    assert cells[:4] == [
        Cell(2, 1024, "fixed", 1.0),
        Cell(4, 256, "scaled", 1.0),
        Cell(8, 256, "scaled", 1.0),
        Cell(8, 256, "scaled", 0.25),
    ]
    assert Cell(2, 1024, "scaled", 1.0) not in cells  # the same as the reference
    assert {(c.views, c.fraction) for c in cells if c.dim == 256 and c.weight == "scaled"} == {
        (v, 1.0) for v in GRID.views
    } | {(v, 2 / v) for v in GRID.views} | {(2, f) for f in GRID.fractions}


def test_every_cell_forwards_the_same_views(tiny_recipe):
    base = load(tiny_recipe, ["train.epochs=16"])
    for cell in claims.cells(GRID):
        recipe = claims.recipe_of(base, cell, 1, GRID, "constant")
        assert recipe.train.epochs * cell.views * cell.fraction == 32
        assert recipe.data.batch_size * cell.views == 64
        alike = claims.recipe_of(base, cell, 1, dataclasses.replace(GRID, per_step="images"), "constant")
        assert alike.data.batch_size == 32
        assert recipe.model.projector == (cell.dim, cell.dim)
        assert (recipe.seed, recipe.optim.schedule) == (1, "constant")
        fixed = redundancy_rule(1024, 2)
        assert recipe.loss.redundancy_weight == ("auto" if cell.weight == "scaled" else pytest.approx(fixed))


def test_the_fixed_weight_is_the_rules_of_the_largest_projector_whatever_the_base_has():
    base = load("cifar10_lowdim", ["loss.redundancy_weight=0.5"])
    for cell, weight in ((REFERENCE, redundancy_rule(1024, 2, form="authors")), (Cell(4, 64, "scaled", 1.0), "auto")):
        recipe = claims.recipe_of(base, cell, 0, GRID, "constant")
        assert recipe.loss.redundancy_weight == weight


def test_cells_are_evaluated_as_often_as_each_other_where_the_base_counts_steps(tiny_recipe):
    base = load(tiny_recipe, ["train.epochs=16", "evaluate.every_steps=5"])
    rhythms = {
        (recipe.evaluate.every_steps, recipe.evaluate.every_epochs)
        for cell in claims.cells(GRID)
        for recipe in [claims.recipe_of(base, cell, 0, GRID, "constant")]
    }
    assert rhythms == {(5, 0)}


@pytest.mark.parametrize(
    ("finals", "expected"),
    [
        ({"d64": 80, "d64_fixed": 70, "v2": 80, "v2_fixed": 75}, HOLDS),
        ({"d64": 80, "d64_fixed": 80, "v2": 80, "v2_fixed": 80}, PART),
        ({"d64": 70, "d64_fixed": 60, "v2": 80, "v2_fixed": 75}, PART),
        ({"d64": 70, "d64_fixed": 60, "v2": 75, "v2_fixed": 75}, NOT),
        ({"d64": 70}, OPEN),
    ],
)
def test_small_projectors(finals, expected):
    assert outcome("1.", story(ref=80, **finals))[0] == expected


@pytest.mark.parametrize(("v2", "v8", "expected"), [(70, 75, HOLDS), (70, 70, PART), (70, 30, NOT), (70, None, OPEN)])
def test_more_views(v2, v8, expected):
    found = story(v2=v2) if v8 is None else story(v2=v2, v8=v8)
    assert outcome("2.", found)[0] == expected


@pytest.mark.parametrize(
    ("quarter", "lonely", "expected"), [(80, 60, HOLDS), (80, 80, PART), (60, 60, NOT), (None, 60, OPEN)]
)
def test_less_data(quarter, lonely, expected):
    found = story(v2=80, v2_quarter=lonely) | ({} if quarter is None else story(v8_quarter=quarter))
    assert outcome("3.", found)[0] == expected


def test_fewer_images_at_equal_epochs_and_in_equal_time():
    """Two views of a quarter take four times the epochs to the end, so after equal epochs they are a quarter there."""
    state, text = outcome("3.", story(v2=80, v2_quarter=80, v8_quarter=80))
    assert state == PART
    assert "V = 2 on 100 % 80.0 ± 0.2 % (n = 3); V = 8 on 25 % 80.0 ± 0.2 % (n = 3)" in text
    assert text.count("V = 2 on 25 % 35.0 ± 0.0 % (n = 3)") == 1
    assert text.endswith("in equal time two views do so too.")
    flat = {Cell(2, 256, "scaled", 0.25): runs(80, epochs=32, start=80)}
    assert outcome("3.", story(v2=80, v8_quarter=80) | flat)[1].endswith("views are not what saves them.")


def test_the_reference_stands_for_two_views_of_all_images_where_those_were_not_trained():
    state, text = outcome("3.", story(ref=80, v2_quarter=60, v8_quarter=80))
    assert state == HOLDS
    assert text.startswith(
        "After equally many views, on test: V = 2 on 100 % with D = 1024 80.0 ± 0.2 % (n = 3); V = 8 "
    )


def test_less_time():
    fast = {Cell(4, 256, "scaled", 1.0): runs(80, seconds=40)}
    state, text = outcome("4.", story(ref=80) | fast)
    assert state == HOLDS
    assert "2.5 times sooner" in text
    assert outcome("4.", story(ref=80) | {Cell(4, 256, "scaled", 1.0): runs(80.3, seconds=80)})[0] == PART
    assert outcome("4.", story(ref=80, v4=60))[0] == NOT
    assert outcome("4.", story(ref=80))[0] == OPEN


def test_seconds_lie_on_the_line_between_evaluations():
    run = Run(0, 50.0, 40.0, [(1, 1, 10.0, 30.0), (2, 2, 20.0, 40.0), (3, 3, 30.0, 40.0), (4, 4, 40.0, 50.0)])
    assert seconds_to(run, 35.0) == 15.0
    assert seconds_to(run, 45.0) == 35.0
    assert seconds_to(run, 30.0) == 10.0
    assert seconds_to(run, 51.0) is None
    assert spread([49.0, 51.0]) == "50.0 ± 1.4 % (n = 2)"


def test_the_command_runs_resumes_and_reports(tiny_recipe, tmp_path, capsys, one_thread):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    words = [str(path), "--dims", "8", "16", "--views", "2", "4", "--fractions", "1", "0.5", "--dim", "8"]
    words += ["--seeds", "1", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "claims.json")]
    words += ["--figures", str(tmp_path / "figures"), "--reach", "0", "101"]
    claims.main([*words, "--plan"])
    assert "V2-D16-fixed-f1" in capsys.readouterr().out
    claims.main([*words, "--budget-min", "0"])
    assert "0 %" not in capsys.readouterr().out
    claims.main(words)
    first = json.loads((tmp_path / "claims.json").read_text())
    assert {c["impl"] for c in first["rows"]} == {
        cell.name for cell in claims.cells(claims.Grid((8, 16), (2, 4), (1.0, 0.5), 8))
    }
    assert [v["claim"][0] for v in first["verdicts"]] == ["1", "2", "3", "4"]
    assert OPEN not in {v["outcome"] for v in first["verdicts"]}
    assert all(v["outcome"].endswith("(some cells have one seed only)") for v in first["verdicts"])
    assert len(list((tmp_path / "figures").glob("claims_*.png"))) == 4
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")}
    seconds = json.loads((tmp_path / "runs" / "seconds_per_step.json").read_text())
    assert set(seconds) == {"V2-D8-B32", "V2-D16-B32", "V4-D8-B16"}
    for name, done in first["curves"].items():
        step_s = seconds[f"{name[:2]}-{name.split('-')[1]}-B{64 // int(name[1])}"]
        steps = json.loads((tmp_path / "runs" / f"{name}-s0" / "summary.json").read_text())["steps"]
        assert done[0]["train_s"] == done[0]["curve"][-1][2] == pytest.approx(steps * step_s)
    reached = [r for r in first["rows"] if r["metric"] == "reached_s"]
    at_first = {name: done[0]["curve"][0][2] for name, done in first["curves"].items()}
    assert {r["impl"]: r["median"] for r in reached if r["work"]["target_pct"] == 0} == pytest.approx(at_first)
    assert {r["n"] for r in reached if r["work"]["target_pct"] == 101} == {0}
    summary = json.loads((tmp_path / "runs" / f"{REFERENCE_OF_16.name}-s0" / "summary.json").read_text())
    accuracies = {k: v for k, v in summary.items() if k.startswith("test_") and k.endswith("_pct")}
    recorded = {r["metric"]: r["median"] for r in first["rows"] if r["impl"] == REFERENCE_OF_16.name}
    assert len(accuracies) > 1
    assert {k: recorded[k] for k in accuracies} == pytest.approx(accuracies)
    claims.main([*words, "--plan", "--only", "V4-D8-scaled-f0.5"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("V4-D8-scaled-f0.5 ")
    with pytest.raises(UserError, match="No cell is named V3"):
        claims.main([*words, "--only", "V3"])
    with pytest.raises(UserError, match=r"Choose one of: .*ridge_pct"):
        claims.main([*words, "--metric", "nope"])
    with pytest.raises(UserError, match="another recipe"):
        claims.main([*words, "-s", "optim.lr=0.1"])
    claims.main(words)  # nothing is run again
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")}
    assert json.loads((tmp_path / "claims.json").read_text())["curves"] == first["curves"]


SMALL = ["--dims", "8", "16", "--views", "2", "--fractions", "1", "--dim", "8", "--only", REFERENCE_OF_16.name]


def test_a_record_is_continued_where_its_runs_folders_are_gone(tiny_recipe, tmp_path, capsys, monkeypatch, one_thread):
    path, out = tmp_path / "base.yaml", tmp_path / "claims.json"
    path.write_text(yaml.safe_dump(tiny_recipe))
    words = [str(path), *SMALL, "--json", str(out), "--figures", str(tmp_path / "figures"), "--resume"]

    def run(folder: str, *more: str) -> dict:
        asked = [*words, "--out", str(tmp_path / folder), *more]
        monkeypatch.setattr(sys, "argv", ["claims.py", *asked])  # a record names its command
        claims.main(asked)
        return json.loads(out.read_text())

    first = run("a", "--seeds", "1")["curves"][REFERENCE_OF_16.name]
    again = run("b", "--seeds", "2")
    assert f"1 runs are those of {out}." in capsys.readouterr().err
    assert {p.parent.name for p in (tmp_path / "b").rglob("summary.json")} == {f"{REFERENCE_OF_16.name}-s1"}
    both = again["curves"][REFERENCE_OF_16.name]
    assert both[0] == first[0]
    assert [run["seed"] for run in both] == [0, 1]
    assert both[0]["train_s"] == pytest.approx(both[1]["train_s"])  # a step's seconds are the record's too

    steps = json.loads((tmp_path / "a" / f"{REFERENCE_OF_16.name}-s0" / "summary.json").read_text())["steps"]
    out.write_text(json.dumps(again | {"hardware": again["hardware"] | {"cpu": "another"}}))
    there = run("c", "--seeds", "2")["curves"][REFERENCE_OF_16.name]
    (step_s,) = json.loads((tmp_path / "c" / "seconds_per_step.json").read_text()).values()  # timed anew
    for one in there:
        assert one["train_s"] == one["curve"][-1][2] == pytest.approx(steps * step_s)
    assert not list((tmp_path / "c").rglob("summary.json"))
    capsys.readouterr()
    run("d", "--seeds", "1")
    assert f"1 runs are those of {out}. 1 others there are of seeds" in capsys.readouterr().err
    with pytest.raises(UserError, match="is of another recipe"):
        run("d", "-s", "optim.lr=0.1")
    with pytest.raises(UserError, match="is of another grid"):
        run("d", "--schedule", "cosine")
    out.write_text(json.dumps(again | {"command": "claims.py x.yaml --no-such-option"}))
    with pytest.raises(UserError, match="is of another grid"):
        run("d")
    for text in ("{", "[]", "{}", '{"bench": "losses"}'):
        out.write_text(text)
        with pytest.raises(UserError, match=r"is not a record of bench/claims\.py"):
            run("d")
