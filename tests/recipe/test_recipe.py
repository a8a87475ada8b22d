"""Recipes: round trips, all problems at once, suggestions, limits, and every shipped recipe."""

import re
from pathlib import Path

import pytest
import yaml

from fastssl.errors import UserError
from fastssl.recipe.load import dump, header, load, shipped
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe

MINIMAL = {"data": {"path": "x.beton"}, "train": {"epochs": 2}}


def test_dump_loads_to_an_equal_recipe() -> None:
    recipe = load(MINIMAL, ["augment.views=4", "loss.name=vicreg", "optim.clip_norm=1.5"])
    assert load(yaml.safe_load(dump(recipe))) == recipe
    assert load(recipe) == recipe


def test_defaults_do_not_depend_on_order_or_override_style() -> None:
    assert load(MINIMAL, ["data.batch_size=64"]) == load({**MINIMAL, "data": {"path": "x.beton", "batch_size": 64}})


def test_every_problem_is_told_at_once() -> None:
    tree = {
        "data": {"path": "x", "bacth_size": 3},
        "augment": {"views": 1},
        "seed": "one",
        "model": {"projector": [0]},
        "loss": {"name": "barlow_twins", "redundancy_weigth": 1},
        "train": {"epochs": "two"},
        "optimizer": {},
    }
    with pytest.raises(UserError) as error:
        load(tree)
    for part in (
        "data.bacth_size is unknown (did you mean batch_size?",
        "augment.views is 1",
        "model.projector.0 is 0",
        "loss.redundancy_weigth is unknown (did you mean redundancy_weight?",
        "train.epochs is 'two'",
        "optimizer is unknown (did you mean optim?",
        "7 problems",
    ):
        assert part in error.value.what


def test_rows_of_the_view_table_are_told_with_the_other_problems() -> None:
    changes = ["augment.all={hflip_p: 2}", "augment.rows=[{vflip_p: 0.5}, {vflip_p: 3}]", "optim.lr=-1"]
    with pytest.raises(UserError) as error:
        load(MINIMAL, changes)
    for part in ("3 problems", "augment.all.hflip_p is 2", "augment.rows.vflip_p is 3", "optim.lr is -1"):
        assert part in error.value.what


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("augment.rows=[" + "{}, " * 33 + "]", "augment.rows has 33 views, and 32 are the most"),
        ("augment.all={hflip_p: 1.5}", "augment.all.hflip_p is 1.5"),
        ("augment.all={hue: 0.6}", "augment.all.hue is 0.6"),
        ("evaluate.knn_k=[]", "evaluate.knn_k is []"),
        ("augment.all={area_min: 0.9, area_max: 0.1}", "area_min 0.9 is above area_max 0.1"),
        ("augment.all={hflp_p: 1}", "did you mean hflip_p?"),
        ("augment.side_px=100000", "augment.side_px"),
        ("augment.views=33", "augment.views"),
        ("augment.rows=[{}]", "augment.rows has fewer than 2 views"),
        ("optim.accumulate_steps=3", "does not divide"),
        ("optim.warmup_epochs=3", "longer than train.epochs"),
        ("loss.name=simclr", "loss.name is unknown"),
        ("loss=vicreg", "loss is 'vicreg', not a mapping: write -s loss.name=VALUE"),
        ("augment.all=none", "augment.all is 'none', not a mapping: write -s augment.all.KEY=VALUE"),
        ("data.path=", "data.path is None, not a path"),
        ("optim.betas=0.9", "optim.betas is 0.9, not a list"),
        ("model.projector=64", "model.projector is 64, not a list"),
        ("loss.redundancy_weight=-1", "loss.redundancy_weight"),
        ("optim.lr=.nan", "optim.lr"),
        ("loss.orthogonality=0.1", "loss.orthogonality is now called redundancy_weight"),
        ("loss.standardise=joint", "loss.standardise is now called loss.standardize"),
        ("augment.applier=cpu", "augment.applier is now called augment.backend"),
        ("data.batch_size=1", "data.batch_size"),
        ("device=tpu", "device"),
    ],
)
def test_bad_values_name_their_field(change: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        load(MINIMAL, [change])
    assert named in error.value.what
    assert "\n" not in error.value.what
    assert "\n" not in error.value.fix


def test_a_key_of_another_loss_is_told_from_a_misspelled_one() -> None:
    with pytest.raises(UserError, match="redundancy_weight is a key of barlow_twins, not of vicreg") as error:
        load("quickstart", ["loss.name=vicreg"])
    (written,) = re.findall(r"-s '(.*)'", error.value.what)
    assert load("quickstart", [written]).loss.name == "vicreg"


@pytest.mark.parametrize("override", ["novalue", "=3", "data.batch_size=[1", "data.batch_size={a: b: c}"])
def test_bad_overrides_are_explained(override: str) -> None:
    with pytest.raises(UserError):
        load(MINIMAL, [override])


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "- 1\n- 2",
        "just words",
        "\x00",
        "a: &x [1]\nb: *x",
        "[" * 100 + "]" * 100,
        "a: !!python/object:os.system {}",
        "",
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        load(path)


def test_a_section_or_key_written_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = "data: {path: x.beton}\noptim:\n  lr: 0.1\ntrain: {epochs: 1, epochs: 2}\noptim:\n  name: sgd\n"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(path)
    assert error.value.what == f"{path}: train.epochs is given twice (line 4); optim is given twice (line 5)."
    with pytest.raises(UserError, match=r"augment\.all\.hue is given twice"):
        load(MINIMAL, ["augment.all={hue: 0.1, hue: 0.2}"])
    path.write_text("data: {path: x.beton}\ntrain: {epochs: 1}\naugment: {rows: [{hue: 0.1}, {hue: 0.1}]}\n")
    assert len(view_table(load(path).augment)) == 2


def test_large_and_binary_files_are_refused(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: " + b"x" * (1 << 20))
    with pytest.raises(UserError, match="larger"):
        load(path)
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="not YAML"):
        load(path)


def test_a_misspelt_recipe_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError) as error:
        load("quickstrat.yaml")
    assert "quickstart" in error.value.fix


def test_an_absent_file_is_no_shipped_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart", "./recipes/quickstart.yaml"):
        assert load(name).name == "quickstart"
    for name in ("experiments/quickstart.yaml", "../quickstart", tmp_path / "quickstart.yaml", "a/recipes/quickstart"):
        with pytest.raises(UserError, match=f"There is no recipe {name}") as error:
            load(name)
        assert error.value.fix == "Did you mean recipes/quickstart.yaml?"


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_have_headers(path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    assert load(path.name) == recipe
    assert len(view_table(recipe.augment)) >= 2
    words = header(path)
    for part in ("Source:", "Hardware:", "Score:", "Command:"):
        assert part in words, f"{path.name}'s header lacks {part}"


def test_asymmetric_rows_alternate_and_multicrop_has_two_large_views() -> None:
    rows = view_table(load(MINIMAL, ["augment.preset=imagenet_asymmetric", "augment.views=4"]).augment)
    assert [row.blur_p for row in rows] == [1.0, 0.1, 1.0, 0.1]
    assert [row.solarize_p for row in rows] == [0.0, 0.2, 0.0, 0.2]
    rows = view_table(load(MINIMAL, ["augment.preset=multicrop", "augment.views=6", "augment.side_px=224"]).augment)
    assert [row.side_px for row in rows] == [224, 224, 96, 96, 96, 96]


def test_rows_change_fields_one_view_at_a_time() -> None:
    rows = view_table(load(MINIMAL, ["augment.rows=[{gray_p: 1}, {side_px: 16}]", "augment.all={hflip_p: 0}"]).augment)
    assert [(row.gray_p, row.side_px, row.hflip_p) for row in rows] == [(1, 32, 0), (0.2, 16, 0)]


def test_recipes_cannot_be_changed() -> None:
    recipe = load(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("side_px", 0),
        ("side_px", 100_000),
        ("area_min", 0.0),
        ("area_max", 0.01),
        ("area_max", 1.5),
        ("aspect_min", 0.0),
        ("aspect_max", 0.5),
        ("pad_px", -1),
        ("hflip_p", 1.01),
        ("jitter_p", -0.1),
        ("gray_p", float("nan")),
        ("brightness", -0.1),
        ("hue", 0.51),
        ("rotate_max_deg", float("inf")),
        ("blur_sigma_min_px", 0.0),
        ("blur_sigma_max_px", 0.01),
        ("solarize_threshold", 1.1),
        ("posterize_bits", 0),
        ("cutout_fraction", 1.1),
    ],
)
def test_each_bound_of_a_view_is_told_with_its_field(field: str, value: float) -> None:
    tree = {"data": {"path": "a.beton"}, "train": {"epochs": 1}, "augment": {"all": {field: value}}}
    with pytest.raises(UserError) as error:
        load(tree)
    assert field in error.value.what
