"""A mistake is named in the words of whoever made it: arguments in Python, options at the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import pytest

import fastssl
from fastssl.bench.new_recipe import write_new
from fastssl.errors import Interrupted, UserError
from fastssl.pretrained.duplicates import duplicates
from fastssl.pretrained.embedding.embed import embed
from fastssl.pretrained.evaluation.evaluate import evaluate
from fastssl.pretrained.export.export import export
from fastssl.recipe.load import load
from fastssl.training.sweep import cells, parse_grid

Mistake = Callable[[Path, dict[str, Any]], object]

MISTAKES: dict[str, Mistake] = {
    "resume=True": lambda run, recipe: fastssl.train(recipe, run_dir=run),
    "run_dir": lambda run, recipe: fastssl.train(recipe, run_dir=run / "recipe.yaml" / "below"),
    "overwrite=True": lambda run, recipe: fastssl.convert("shapes", recipe["data"]["path"], count=4, overwrite=False),
    "recipe": lambda run, recipe: fastssl.load(run.parent),
    "out": lambda run, recipe: embed(run, "shapes", run / "features.txt"),
    "layers": lambda run, recipe: evaluate(run, layers=["head"]),
    "probes": lambda run, recipe: evaluate(run, probes=["forest"]),
    "few_label_pct": lambda run, recipe: evaluate(run, few_label_pct=[200]),
    "on='train'": lambda run, recipe: evaluate(run, on="train"),  # type: ignore[arg-type]
    "grid": lambda run, recipe: parse_grid(["lr"]),
    "seeds": lambda run, recipe: cells(recipe, {"seed": [1, 2]}, seeds=2, out=run),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_python_names_arguments(words: str, finished_run: Path, tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        MISTAKES[words](finished_run, tiny_recipe)
    assert words in str(error.value)
    assert " --" not in f" {error.value}"


def test_a_signal_says_how_to_continue() -> None:
    assert "resume=True, run_dir='runs/a'" in str(Interrupted("SIGTERM", Path("runs/a")))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", "quickstart", "--run-dir", "{run}"], "Add --resume to continue it, or choose another --run-dir."),
        (["embed", "{run}", "shapes", "--out", "features.txt"], "Error: --out is features.txt"),
        (["eval", "{run}", "--probe", "forest"], "Error: --probe forest"),
        (["convert", "shapes", "{data}", "--count", "4"], "--force"),
    ],
)
def test_the_command_line_names_options(
    words: list[str], option: str, finished_run: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    words = [word.format(run=finished_run, data=tiny_data[0]) for word in words]
    done = command.fastssl(*words, cwd=tmp_path, timeout=600)
    assert done.returncode == 2, done.stderr
    assert option in done.stderr


TOGETHER: dict[str, tuple[Mistake, list[str]]] = {
    "convert": (
        lambda run, recipe: fastssl.convert("shapes", None, mode="tiff", quality=101, side_px=0, fraction=2, limit=0),  # type: ignore[arg-type]
        ["mode is 'tiff'", "quality is 101", "side_px is 0", "fraction is 2", "limit is 0", "no output"],
    ),
    "convert's outputs": (
        lambda run, recipe: fastssl.convert(
            "shapes", recipe["data"]["path"], count=4, mode="jpg", channels=1, overwrite=False
        ),
        ["mode is jpg", "exists already"],
    ),
    "evaluate": (
        lambda run, recipe: evaluate(
            run,
            probes=["forest"],
            views=[0],
            layers=["head"],
            few_label_pct=[200],
            on="train",
            finetune_lr=0,  # type: ignore[arg-type]
        ),
        ["probes forest", "views 0", "layers head", "few_label_pct 200", "on='train'", "finetune_lr=0"],
    ),
    "embed": (
        lambda run, recipe: embed(run, "shapes", run / "features.txt", batch_size=0),
        ["features.txt", "batch_size is 0"],
    ),
    "duplicates": (
        lambda run, recipe: duplicates(run, "shapes", run / "pairs.txt", threshold=2, most=0),
        ["pairs.txt", "threshold is 2", "most is 0"],
    ),
    "export": (
        lambda run, recipe: export(run, run, to="timm"),
        ["does not suit timm", "exists already"],
    ),
    "views": (
        lambda run, recipe: fastssl.views(recipe["data"]["path"], batch_size=8, views="4", dtype=int, device="tpu"),  # type: ignore[arg-type]
        ["views is '4'", "dtype is", "device is 'tpu'"],
    ),
    "a new recipe": (
        lambda run, recipe: write_new(run / "none.txt", run / "new.txt", minutes=-1),
        ["none.txt is not a .beton", "new.txt", "minutes is -1"],
    ),
    "a recipe": (
        lambda run, recipe: load(recipe, ["seed", "data.batch_size=[", "loss.name=simclr", "optim.lr=-1"]),
        ["-s 'seed'", "data.batch_size=[", "loss.name", "optim.lr"],
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_all_mistakes_are_named_at_once(name: str, finished_run: Path, tiny_recipe: dict[str, Any]) -> None:
    mistake, words = TOGETHER[name]
    with pytest.raises(UserError) as error:
        mistake(finished_run, tiny_recipe)
    assert not [word for word in words if word not in error.value.what], error.value.what
    assert f"{error.value}".count("\n") == 1
    assert ".." not in error.value.what.replace("...", "")


def test_words_that_are_no_numbers_are_named_with_the_rest(finished_run: Path, tmp_path: Path) -> None:
    mistakes = ["--views", "1,many", "--few-label", "one", "--probe", "forest"]
    done = command.fastssl("eval", str(finished_run), *mistakes, cwd=tmp_path, timeout=600)
    assert done.returncode == 2
    assert not [word for word in ("1,many", "--few-label one", "--probe forest") if word not in done.stderr]


def test_another_recipe_than_the_run_was_trained_by_is_refused(finished_run: Path) -> None:
    own = load(finished_run / "recipe.yaml")
    assert fastssl.load(finished_run, recipe=own, device="cpu").run_dir == finished_run
    with pytest.raises(UserError, match=r"differs in augment\.side_px, optim\.lr"):
        fastssl.load(finished_run, recipe=load(own, ["augment.side_px=20", "optim.lr=0.5"]))
