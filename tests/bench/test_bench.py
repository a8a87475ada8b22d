"""`fastssl bench`: closed forms of crossings and speed-ups, refusals, and small real runs of every sub-command."""

import itertools
import json
import math
import statistics
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_torch_thread
from typer.testing import CliRunner

import fastssl
from fastssl.bench import dry_run, machine, tta, variants
from fastssl.bench.compare import compare, read, verdict
from fastssl.bench.crossing import Timed, first_crossing, median_or_none, speed_up
from fastssl.bench.parts import parts
from fastssl.bench.record import record, row, save
from fastssl.bench.timing import Laps, rate, side_by_side
from fastssl.cli import app
from fastssl.cli.bench_tables import compare_text, machine_text, made_earlier, tta_text, variants_text
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.runs import reading
from fastssl.training.online_probes import Prober

ROOT = Path(__file__).parents[2]
NOTHING = lambda: None  # noqa: E731


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_torch_thread():
        yield


def curve(*values: float) -> list[dict[str, Any]]:
    """Evaluations every 10 s, 5 steps and 40 images."""
    return [
        {"step": 5 * i, "epoch": i / 2, "images": 40 * i, "train_s": 10.0 * i, "knn20_pct": value}
        for i, value in enumerate(values, 1)
    ]


def test_the_first_evaluation_at_the_target_counts():
    at = first_crossing(curve(30, 50, 45, 60), "knn20_pct", 50, views=4)
    assert at is not None
    assert (at.train_s, at.steps, at.epochs, at.images, at.views, at.value_pct, at.gap_s) == (
        20,
        10,
        1,
        80,
        320,
        50,
        10,
    )
    assert first_crossing(curve(30, 50), "knn20_pct", 50.1, views=4) is None
    assert first_crossing(curve(30, 50), "ridge_pct", 1, views=4) is None
    assert first_crossing([], "knn20_pct", 1, views=4) is None


def test_a_median_counts_those_that_did_not_arrive_as_last():
    assert median_or_none([3.0, None, 1.0]) == 3.0
    assert median_or_none([3.0, None, None]) is None
    assert median_or_none([4.0, 2.0]) == 3.0
    assert median_or_none([]) is None


def reached(*seconds: float) -> list[Timed]:
    return [Timed(s, True) for s in seconds]


def test_speed_up_is_the_ratio_of_medians_and_its_interval_the_bootstraps():
    base, other = [30.0, 40.0, 80.0], [9.0, 10.0, 20.0]
    found = speed_up(reached(*base), reached(*other))
    assert found["ratio"] == 4.0
    assert found["bound"] == "exact"
    medians = [[statistics.median(draw) for draw in itertools.product(x, repeat=3)] for x in (base, other)]
    every = sorted(a / b for a, b in itertools.product(*medians))  # all 27 x 27 resamples, exactly
    assert found["low"] == pytest.approx(every[round(0.025 * len(every))], rel=0.01)
    assert found["high"] == pytest.approx(every[round(0.975 * len(every))], rel=0.01)


def test_speed_up_of_equal_times_is_one_and_one_seed_has_no_interval():
    assert speed_up(reached(7, 7), reached(7, 7)) == {
        "bound": "exact", "ratio": 1.0, "low": 1.0, "high": 1.0, "n": 2,
    }  # fmt: skip
    assert speed_up(reached(8), reached(2))["low"] is None


@pytest.mark.parametrize(
    ("base", "other", "bound"),
    [(False, True, "at least"), (True, False, "at most"), (False, False, "unknown"), (True, True, "exact")],
)
def test_runs_that_did_not_arrive_bound_the_speed_up(base: bool, other: bool, bound: str):
    found = speed_up([Timed(10, True), Timed(10, base)], [Timed(5, True), Timed(5, other)])
    assert found["bound"] == bound
    assert found["ratio"] == (None if bound == "unknown" else 2.0)


def test_rates_count_items_and_take_turns():
    order: list[str] = []

    def step(name: str) -> int:
        order.append(name)
        return 3

    found = side_by_side({"a": lambda: step("a"), "b": lambda: step("b")}, wait=NOTHING, window_s=0.0, rounds=2)
    assert order == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    assert rate(lambda: 3, NOTHING, 0.0) > 0


def test_laps_of_one_name_add_up():
    waits: list[int] = []
    laps = Laps(lambda: waits.append(1))
    for name in ("forward", "backward", "forward"):
        laps(name)
    assert list(laps.seconds) == ["forward", "backward"]
    assert len(waits) == 4


def test_a_row_of_nothing_has_no_median_and_an_even_one_the_middle_of_two():
    assert row("a", {}, "ms", [])["median"] is None
    made = row("a", {"b": 1}, "ms", [4.0, 1.0, 2.0, 8.0], note="x")
    assert (made["median"], made["min"], made["max"], made["n"], made["values"]) == (3.0, 1.0, 8.0, 4, [4, 1, 2, 8])
    assert made["note"] == "x"


def test_every_record_carries_its_machine_versions_and_command():
    made = record("x", [], {"seed": 1}, data_digest="d")
    assert {"hardware", "versions", "commit", "command", "date", "recipe", "rows", "data_digest"} <= made.keys()


def result(*values: float, **more: Any) -> dict[str, Any]:
    return record("step", [row("ours", {"batch": 8}, "images_per_s", values)], {"seed": 0}, data_digest="d") | more


def test_compare_tells_differences_from_noise():
    low, high = (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)
    assert compare(result(*low), result(*high))["rows"][0]["verdict"] == "higher"
    assert compare(result(*high), result(*low))["rows"][0]["verdict"] == "lower"
    assert compare(result(*low), result(4.0, 5.0, 6.0, 7.0))["rows"][0]["verdict"] == "within noise"
    assert compare(result(*low[:3]), result(*high[:3]))["rows"][0]["verdict"] == "too few repeats"
    assert compare(result(*low), result(*high))["rows"][0]["ratio"] == 6.5 / 2.5
    for work, said in (({"target": "knn20_pct"}, "not reached"), ({}, "not measured")):  # compile_s has no target
        assert verdict(row("a", work, "s", []), row("a", work, "s", [1.0])) == said
        assert verdict(row("a", work, "s", []), row("a", work, "s", [])) == said


def test_a_seed_that_never_arrived_is_slower_than_any_that_did():
    slow, fast = (
        row("a", {}, "train_s", [100.0, 103.0, 105.0, 107.0, 110.0]),
        row("a", {}, "train_s", [50.0, 60.0, 70.0]),
    )
    assert verdict(slow | {"seeds": 5}, fast | {"seeds": 3}) == "lower"
    assert verdict(slow | {"seeds": 5}, fast | {"seeds": 5}) == "within noise"  # two of five took longer than all
    assert verdict(fast | {"seeds": 5}, slow | {"seeds": 5}) == "within noise"


def test_compare_names_what_else_differs():
    other = result(1.0, 2.0) | {"recipe": {"seed": 1}}
    found = compare(result(1.0, 2.0), other)
    assert found["differences"]["recipe"] == ["seed (0 and 1)"]
    assert "seed (0 and 1)" in compare_text(found)


def test_compare_names_what_differs_in_every_recipe_of_a_record():
    first, second = ({"recipe": {"lr": 1}, "recipes": {"A": {"lr": 1}, "B": {"lr": lr}}} for lr in (2, 3))
    found = compare(result(1.0) | first, result(1.0) | second)
    assert found["differences"]["recipes"] == ["B.lr (2 and 3)"]
    assert "B.lr (2 and 3)" in compare_text(found)


def test_parts_of_a_record_are_compared_each_with_its_own():
    parts_of = [row("ours", {}, "s", [value], part=part) for value, part in ((1.0, "first"), (2.0, "second"))]
    found = compare(result() | {"rows": parts_of}, result() | {"rows": parts_of[::-1]})
    assert [(r["part"], r["ratio"]) for r in found["rows"]] == [("first", 1.0), ("second", 1.0)]
    assert "ours second" in compare_text(found)
    with pytest.raises(UserError, match=r"s of ours .* twice"):
        compare(result() | {"rows": [*parts_of, parts_of[0]]}, result())


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_row_of_the_shipped_records_is_compared(path: Path):
    found = compare(read(path), read(path))
    assert (len(found["rows"]), found["unmatched"]) == (len(read(path)["rows"]), 0)
    assert compare_text(found)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bench": "loader"}, "bench"),
        ({"data_digest": "other"}, "data_digest"),
        ({"targets": {"knn20_pct": 80}}, "targets"),
        ({"rows": [row("ours", {"batch": 16}, "images_per_s", [1.0])]}, "batch (8 and 16)"),
        ({"rows": []}, "empty"),
    ],
)
def test_unlike_results_are_not_compared(change: dict[str, Any], named: str):
    with pytest.raises(UserError) as refused:
        compare(result(1.0), result(1.0) | change)
    assert named in refused.value.what


@pytest.mark.parametrize("text", ["{", "[1]", '{"bench": "x"}', None])
def test_what_is_not_a_record_is_refused(tmp_path: Path, text: str | None):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as refused:
        read(path)
    assert "a.json" in refused.value.what


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ({"a": 1}, "rows are not a list"),
        ([1], "row 1 is not a mapping"),
        ([row("a", {}, "s", [1.0]), {"impl": "a", "work": {}, "metric": "s", "min": 1, "max": 1, "n": 1}], "row 2"),
        ([row("a", {}, "s", [1.0]) | {"median": "fast"}], "median"),
        ([row("a", {}, "s", [1.0]) | {"work": [], "n": None}], "work and n"),
        ([row("a", {}, "s", [1.0]) | {"seeds": "three"}], "seeds"),
        ([row("a", {}, "s", [1.0]) | {"max": None}], "without min and max"),
    ],
)
def test_rows_that_are_no_measurements_are_refused_by_number(tmp_path: Path, rows: Any, named: str):
    (tmp_path / "a.json").write_text(json.dumps(result(1.0) | {"rows": rows}))
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.json")
    assert "a.json" in refused.value.what
    assert named in refused.value.what


def test_the_machine_check_accounts_for_the_whole_step(tiny_recipe: dict[str, Any]):
    made = machine.machine_check(load(tiny_recipe), seconds=0.1)
    of = {(r["work"].get("stage", r["impl"]), r["metric"]): r for r in made["rows"]}
    stages = ("loader", "augmentation", "forward", "backward", "optimizer")
    shares = [of[stage, "share_pct"]["values"] for stage in stages]
    assert [sum(step) for step in zip(*shares, strict=True)] == pytest.approx([100] * len(shares[0]))
    assert of["step", "views_per_s"]["median"] == pytest.approx(2 * of["step", "images_per_s"]["median"])
    assert {stage for stage, metric in of if metric == "compute_pct"} == {"forward", "backward"}
    assert of["matmul", "tflop_per_s"]["max"] > 0
    assert made["bottleneck"]["stage"] in (*stages, "evaluation")
    assert of["evaluation", "seconds"]["work"]["images"] == 200
    assert made["data_digest"] == json.loads(Path(tiny_recipe["data"]["path"] + ".json").read_text())["digest"]
    text = machine_text(made)
    assert "Bottleneck" in text
    assert all(stage in text for stage in stages)


@pytest.mark.parametrize(
    ("epochs", "steps", "apart"),
    [(1, 0, 5), (2, 0, 10), (0, 3, 3), (0, 0, float("inf")), (1, 1, 1), (1, 5, 5), (1, 3, 15 / 7)],
)
def test_the_machine_check_counts_evaluations_by_epochs_and_by_steps(
    tiny_recipe: dict[str, Any], epochs: int, steps: int, apart: float
):
    recipe = load(tiny_recipe, [f"evaluate.every_epochs={epochs}", f"evaluate.every_steps={steps}"])
    assert machine.steps_between_evaluations(recipe, 5) == pytest.approx(apart)
    due = [step for step in range(1, 31) if (epochs and step % (5 * epochs) == 0) or (steps and step % steps == 0)]
    assert len(due) == pytest.approx(30 / apart)


def test_backward_does_twice_the_work_of_forward(tiny_recipe: dict[str, Any]):
    from fastssl.bench.parts import parts

    made = parts(load(tiny_recipe))
    flops = machine.stage_flops(made)
    assert 1.7 < flops["backward"] / flops["forward"] < 2.1  # no gradient for the images
    assert made.plain.backbone.conv1.weight.grad is None


def test_slow_steps_get_a_smaller_batch_and_a_word(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    recipe = load(tiny_recipe)
    assert machine.bearable(recipe) == (recipe, [])
    monkeypatch.setattr(machine, "MAX_STEP_S", 1e-9)
    smaller, notes = machine.bearable(recipe)
    assert smaller.data.batch_size == 8
    assert "measured with 8" in notes[0]


def test_a_slow_update_takes_no_longer_for_a_larger_batch(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    from fastssl.bench.parts import Parts

    recipe = load(tiny_recipe, ["data.batch_size=64"])
    monkeypatch.setattr(Parts, "phases", lambda self, batches, wait: {"forward": 0.01, "optimizer": 1.0})
    assert machine.bearable(recipe) == (recipe, [])  # 1.1 s, not 8
    monkeypatch.setattr(Parts, "phases", lambda self, batches, wait: {"forward": 0.8, "optimizer": 1.0})
    smaller, (note,) = machine.bearable(recipe)
    assert smaller.data.batch_size == 16  # 2.6 s; 32 would take 4.2
    assert note == "A step of 64 images takes about 7 s here: measured with 16 instead."


def test_the_step_is_set_next_to_a_fixed_batch(tiny_recipe: dict[str, Any]):
    made = variants.step(load(tiny_recipe), seconds=0.05, rounds=2, only=["fixed", "as trained", "channels", "prec"])
    rows = {(r["impl"], r["metric"]): r for r in made["rows"]}
    names = {"fixed batch", "as trained", "channels_last=false", "precision=bf16"}
    assert {impl for impl, metric in rows if metric == "images_per_s"} == names
    ratio = rows["as trained", "time_against_fixed"]["values"][0]
    fixed, trained = (rows[name, "images_per_s"]["values"][0] for name in ("fixed batch", "as trained"))
    assert ratio == pytest.approx(fixed / trained)
    assert "1.000x" in variants_text(made)


def test_multicrop_is_measured_with_both_sides(tiny_recipe: dict[str, Any]):
    recipe = load(tiny_recipe, ["augment.preset=multicrop", "augment.views=4", "augment.small_side_px=8"])
    made = variants.step(recipe, seconds=0.05, rounds=1, only=["fixed", "as trained"])
    assert [r["work"]["views"] for r in made["rows"]] == [4] * 3
    sides = [tuple(group.shape[:1]) + tuple(group.shape[3:]) for group in next(parts(recipe).trained_on())]
    assert sides == [(2, 16, 16), (2, 8, 8)]


def test_graphs_are_a_variant_where_there_is_cuda(tiny_recipe: dict[str, Any]):
    recipe, graphs = load(tiny_recipe), "compile=reduce-overhead"
    assert graphs not in variants.settings(recipe, torch.device("cpu"))
    for one in (recipe, load(recipe, ["train.cuda_graph=true"])):
        changes = variants.settings(one, torch.device("cuda"))[graphs]
        assert load(one, changes).train.compile == "reduce-overhead"
    assert load(recipe, ["train.compile=reduce-overhead"]).train.compile == "reduce-overhead"
    (changes,) = (c for name, c in variants.settings(recipe, torch.device("cuda")).items() if "cuda_graph" in name)
    assert load(recipe, changes).train.cuda_graph


def test_a_setting_that_does_not_run_here_is_said(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    made = variants.step(load(tiny_recipe), seconds=0.05, rounds=1, only=["fixed", "compile"])
    assert [r["impl"] for r in made["rows"]] == ["fixed batch"]
    assert made["notes"] == ["compile=true does not run here and is left out: no compiler"]


def test_a_variant_is_freed_before_the_next_and_too_little_memory_loses_its_row_alone(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    alive: list[weakref.ref[Any]] = []

    def small(recipe: Any) -> Any:
        assert not [network for network in alive if network() is not None]
        if recipe.train.precision != "fp32":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 75 GiB.")
        made = parts(recipe)
        alive.append(weakref.ref(made.plain))
        return made

    monkeypatch.setattr(variants, "parts", small)
    made = variants.step(load(tiny_recipe), seconds=0.05, rounds=1, only=["fixed", "as trained", "prec", "channels"])
    assert {r["impl"] for r in made["rows"]} == {"fixed batch", "as trained", "channels_last=false"}
    assert made["notes"][0] == (
        "precision=bf16 does not run here and is left out: CUDA out of memory. Tried to allocate 75 GiB."
    )
    assert len(alive) == 3


@pytest.mark.parametrize("left_out", ["absent", "broken"])
def test_where_no_variant_runs_the_reasons_are_said(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(variants, "installed", lambda package: left_out == "broken")
    if left_out == "broken":
        monkeypatch.setattr(variants, "side_by_side", broken)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_recipe))
    words = ["bench", "loader", str(tmp_path / "tiny.yaml"), "--only", "ffcv", "--only", "dali", "--seconds", "0.05"]
    with pytest.raises(UserError) as refused:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert refused.value.what.startswith("No variant runs here: ffcv ")
    assert "dali" in refused.value.what


def test_loaders_and_backends_side_by_side(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variants, "installed", lambda name: False)
    made = variants.loader(load(tiny_recipe), seconds=0.05, rounds=2)
    assert [r["impl"] for r in made["rows"]] == ["resident", "resident, mapped file"]
    *absent, in_place = made["notes"]
    assert in_place.startswith("resident: nothing is copied")
    assert absent == [f"{name} is not installed and left out." for name in ("ffcv", "dali")]
    made = variants.augment(load(tiny_recipe), seconds=0.05, rounds=2)
    assert {r["impl"] for r in made["rows"]} == {f"{a}, {t}" for a in ("cpu", "torch") for t in ("float32", "bfloat16")}
    assert all(r["n"] == 2 for r in made["rows"])


@pytest.fixture
def pair(tiny_recipe: dict[str, Any]) -> list[Any]:
    """Two recipes of one work: with two views and with three."""
    base = load(tiny_recipe, ["train.epochs=3", "evaluate.linear_epochs=0"])
    return [load(base, ["name=two"]), load(base, ["name=three", "augment.views=3"])]


def test_time_to_accuracy_stops_reuses_and_tells(pair: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard: list[dict[str, Any]] = []
    options: dict[str, Any] = {"seeds": 2, "folder": tmp_path, "stop_at_target": True, "observe": heard.append}
    made = tta.tta(pair, {"knn5_pct": 1.0}, **options)  # any network does better than 1 %
    assert [e["epoch"] for e in heard if e["event"] == "evaluation"] == [1] * 4
    rows = {(r["impl"], r["metric"]): r for r in made["rows"]}
    assert rows["two", "steps"]["values"] == [5, 5]  # 160 images, batches of 32
    assert rows["three", "views"]["values"] == [3 * 160] * 2
    assert rows["two", "train_s"]["reached" if "reached" in rows["two", "train_s"] else "n"] == 2
    assert rows["two", "apart_s"]["min"] > 0
    assert made["speed_ups"][0]["bound"] == "exact"
    assert "three reaches knn5 1 %" in tta_text(made)

    monkeypatch.setattr(tta.loop, "train", lambda *_, **__: pytest.fail("finished runs are used again"))
    monkeypatch.setattr(tta, "warm_up", lambda recipe: pytest.fail("nothing is left to warm up for"))
    again = tta.tta(pair, {"knn5_pct": 1.0}, **options)
    assert again["rows"] == made["rows"]


@pytest.mark.parametrize("budget_s", [0.0, -1.0, math.nan])
def test_a_budget_in_which_nothing_trains_is_refused(tmp_path: Path, budget_s: float):
    with pytest.raises(UserError, match=f"budget_s is {budget_s:g}"):
        tta.tta([], {}, seeds=1, folder=tmp_path, budget_s=budget_s)


def test_a_budget_of_seconds_ends_a_run_at_the_next_evaluation(
    pair: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options: dict[str, Any] = {"seeds": 1, "folder": tmp_path, "budget_s": 1e-3}
    made = tta.tta(pair, {"knn5_pct": 101.0}, **options)
    for name, steps in (("two", 5), ("three", 5)):
        (curve,) = made["curves"][name]
        assert [one["step"] for one in curve["evaluations"]] == [steps]
    assert made["speed_ups"][0]["bound"] == "unknown"
    monkeypatch.setattr(tta.loop, "train", lambda *_, **__: pytest.fail("the budget is spent"))
    assert tta.tta(pair, {"knn5_pct": 101.0}, **options)["rows"] == made["rows"]


def test_evaluations_between_epochs_make_crossings_sharper_and_stay_off_the_clock(
    pair: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    slow_s, measure = 0.3, Prober.while_training

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(slow_s)
        return measure(*arguments, **options)

    monkeypatch.setattr(Prober, "while_training", slowly)
    often = [load(one, ["evaluate.every_steps=2", "train.epochs=1"]) for one in pair]
    made = tta.tta(often, {"knn5_pct": 1.0}, seeds=1, folder=tmp_path)
    rows = {(r["impl"], r["metric"]): r for r in made["rows"]}
    for one in often:
        (curve,) = made["curves"][one.name]
        assert [e["step"] for e in curve["evaluations"]] == [2, 4, 5]
        assert rows[one.name, "steps"]["values"] == [2]  # not the end of the epoch
        assert rows[one.name, "apart_s"]["min"] >= 3 * slow_s


def test_a_cut_off_keeps_what_is_finished(pair: list[Any], tmp_path: Path):
    kept: list[dict[str, Any]] = []

    def keep(made: dict[str, Any]) -> None:
        kept.append(made)
        if len(kept) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tta.tta(pair, {"knn5_pct": 1.0}, seeds=2, folder=tmp_path, stop_at_target=True, keep=keep)
    counts = [{r["impl"]: r["n"] for r in made["rows"] if r["metric"] == "train_s"} for made in kept]
    assert counts == [{"two": 1, "three": 0}, {"two": 1, "three": 1}, {"two": 2, "three": 1}]
    assert [made["speed_ups"][0]["bound"] for made in kept] == ["unknown", "exact", "exact"]


def test_finished_runs_of_other_images_are_refused(pair: list[Any], tmp_path: Path):
    seeded = tmp_path / f"two-s{pair[0].seed}"
    seeded.mkdir()
    (seeded / "data.json").write_text(json.dumps({"digest": "sha256:other"}))
    with pytest.raises(UserError, match="made with other images than"):
        tta.tta(pair, {"knn5_pct": 1.0}, seeds=1, folder=tmp_path)


def test_runs_of_an_earlier_commit_are_named():
    now = {"commit": "b", "hardware": {"cpu": "x", "gpus": []}}
    trials = [{"seed": 0, "made_by": now}, {"seed": 1, "made_by": now | {"commit": "a"}}, {"seed": 2, "made_by": {}}]
    (said,) = made_earlier(now | {"curves": {"two": trials}})
    assert "two, seed 1." in said
    assert "seed 0" not in said
    assert "seed 2" not in said
    assert made_earlier(now | {"curves": {"two": trials[:1]}}) == []


def test_a_step_that_does_not_fit_is_timed_with_fewer_images(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    tried = []

    def step(recipe: Any, network: Any, channels: int, device: Any, *, batch: int) -> float:
        tried.append(batch)
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 8.0

    monkeypatch.setattr(dry_run, "seconds_of_step", step)
    found = dry_run.seconds_per_image(load(tiny_recipe), None, 3, torch.device("cuda"))  # type: ignore[arg-type]
    assert (tried, found) == ([32, 16, 8, 4], (2.0, 4))


def test_not_reached_is_a_result(pair: list[Any], tmp_path: Path):
    made = tta.tta(pair, {"knn5_pct": 100.0}, seeds=1, folder=tmp_path)
    of = {(r["impl"], r["metric"]): r for r in made["rows"]}["two", "train_s"]
    assert (of["median"], of["n"], of["seeds"]) == (None, 0, 1)
    assert made["speed_ups"][0]["bound"] == "unknown"
    assert "not reached" in tta_text(made)
    assert len(made["curves"]["two"][0]["evaluations"]) == 3
    save(tmp_path / "a.json", made)
    assert compare(read(tmp_path / "a.json"), made)["rows"][0]["verdict"] == "not reached"


def test_trials_leave_every_group_of_images_its_statistics(pair: list[Any]):
    """16 images for a dry run, 8 for the machine check, would leave groups with none."""
    for groups, parts_of_step in ((16, 1), (5, 2)):
        model = ["model.batch_norm=per_view", f"model.batch_norm_groups={groups}"]
        recipe = load(pair[0], [*model, "data.batch_size=40", f"optim.accumulate_steps={parts_of_step}"])
        assert machine.bearable(recipe) == (recipe, [])
        assert dry_run.describe(recipe)["estimated_train_s"] > 0


def test_a_stopped_run_is_whole_and_goes_on(pair: list[Any], tmp_path: Path):
    """The target ends it inside an evaluation; the same folder then trains to its end as if nothing had been."""
    tta.run(pair[0], tmp_path / "a", tta.Ends({"knn5_pct": 1.0}, True), observe=lambda one: None)
    assert not (tmp_path / "a" / "summary.json").exists()
    assert reading.state_of(tmp_path / "a") == "interrupted"
    fastssl.train(pair[0], run_dir=tmp_path / "a", resume=True)
    fastssl.train(pair[0], run_dir=tmp_path / "b")
    ours, theirs = ([e["knn5_pct"] for e in tta.evaluations_of(tmp_path / name)] for name in "ab")
    assert ours == theirs
    assert len(ours) == 3


def test_recipes_of_unlike_work_are_refused(pair: list[Any], tiny_data: tuple[Path, Path], tmp_path: Path):
    two, three = pair
    for other, named in (
        (load(three, ["name=two"]), "one name"),
        (load(three, ["evaluate.max_train=50"]), "evaluate.max_train"),
        (load(three, [f"data.path={tiny_data[1]}", "data.batch_size=32"]), "data differ"),
    ):
        with pytest.raises(UserError) as refused:
            tta.tta([two, other], {"knn5_pct": 1.0}, seeds=1, folder=tmp_path)
        assert named in refused.value.what
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_recipe_is_refused(pair: list[Any], tmp_path: Path):
    fastssl.train(load(pair[0], ["optim.lr=0.1", "train.epochs=1"]), run_dir=tmp_path / "two-s0")
    with pytest.raises(UserError) as refused:
        tta.tta(pair, {"knn5_pct": 1.0}, seeds=1, folder=tmp_path)
    assert "another recipe" in refused.value.what


def test_targets_that_are_not_measured_are_refused_before_anything_runs(
    pair: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tta, "warm_up", lambda recipe: pytest.fail("refused before"))
    monkeypatch.setattr(tta.loop, "train", lambda *_, **__: pytest.fail("refused before"))
    options: dict[str, Any] = {"seeds": 1, "folder": tmp_path}
    with pytest.raises(UserError) as refused:
        tta.tta(pair, {"knn5_pct": 1.0, "nonsense_pct": 1.0, "knn7_pct": 1.0, "linear_pct": 1.0}, **options)
    assert all(name in refused.value.what for name in ("3 problems", "nonsense", "knn7", "linear probe"))
    assert "some of: knn5, knn20, ridge." in refused.value.fix
    assert "linear_epochs_while_training" in refused.value.fix
    with pytest.raises(UserError, match="No labeled images are held out") as refused:
        tta.tta([load(pair[0], ["data.val_count=0"])], {"knn5_pct": 1.0}, **options)
    assert "data.val_count" in refused.value.fix
    assert not list(tmp_path.iterdir())


def test_a_half_written_last_line_is_left_out(pair: list[Any], tmp_path: Path):
    folder = tmp_path / "two-s0"
    tta.run(pair[0], folder, tta.Ends({"knn5_pct": 1.0}, True), observe=lambda line: None)
    seen = tta.evaluations_of(folder)
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"event": "evaluation", "st')
    assert tta.evaluations_of(folder) == seen
    made = tta.tta(pair[:1], {"knn5_pct": 1.0}, seeds=1, folder=tmp_path, stop_at_target=True)
    assert made["curves"]["two"][0]["evaluations"] == seen


def test_the_linear_probe_can_be_a_target(pair: list[Any], tmp_path: Path):
    with pytest.raises(UserError) as refused:
        tta.tta(pair[:1], {"linear_pct": 1.0}, seeds=1, folder=tmp_path)
    assert "linear_epochs_while_training" in refused.value.fix
    probed = load(pair[0], ["evaluate.linear_epochs_while_training=1"])
    made = tta.tta([probed], {"linear_pct": 1.0}, seeds=1, folder=tmp_path, stop_at_target=True)
    assert {r["metric"]: r["values"] for r in made["rows"]}["steps"] == [5]


def test_targets_are_parsed(pair: list[Any]):
    assert tta.parse_targets("knn=80, ridge=82.5", pair[0]) == {"knn5_pct": 80.0, "ridge_pct": 82.5}
    assert tta.parse_targets("knn20=80", pair[0]) == {"knn20_pct": 80.0}
    for wrong in ("", "knn", "knn=", "knn=x", "knn=0", "knn=101", "=3", "knn=nan"):
        with pytest.raises(UserError):
            tta.parse_targets(wrong, pair[0])
    for twice in ("knn=80,knn=85", "knn=80,knn5=85", "ridge=1,ridge_pct=2"):
        with pytest.raises(UserError, match="twice"):
            tta.parse_targets(twice, pair[0])
    with pytest.raises(UserError) as refused:
        tta.parse_targets("knn,ridge=x,knn5=80,knn=85", pair[0])
    assert all(part in refused.value.what for part in ("'knn'", "'ridge=x'", "knn5 twice"))


def test_the_command_writes_and_compares(tiny_recipe: dict[str, Any], tmp_path: Path):
    import yaml

    path, runner = tmp_path / "tiny.yaml", CliRunner()
    path.write_text(yaml.safe_dump(tiny_recipe))
    for name in "ab":
        out = str(tmp_path / f"{name}.json")
        words = ["bench", "augment", str(path), "--only", "cpu", "--seconds", "0.05", "--out", out, "--json"]
        done = runner.invoke(app, words, catch_exceptions=False)
        assert json.loads(done.stdout.splitlines()[-1])["bench"] == "augment"
    done = runner.invoke(app, ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "images_per_s" in done.stdout


def test_bench_alone_is_the_machine_check(tiny_recipe: dict[str, Any], tmp_path: Path):
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    done = CliRunner().invoke(app, ["bench", str(path), "--seconds", "0.1", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout.splitlines()[-1])["bench"] == "machine"
