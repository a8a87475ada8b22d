"""A mistake is named in the words of whoever made it: arguments in Python, options at the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import pytest

import fastssl
from fastssl.errors import Interrupted, UserError
from fastssl.pretrained.embedding.embed import embed
from fastssl.pretrained.evaluation.evaluate import evaluate
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
