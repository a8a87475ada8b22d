"""Paths of recipes with ~ and $VAR, and keys that lack their section."""

from pathlib import Path

import pytest

from fastssl.errors import UserError
from fastssl.recipe.load import dump, load


def test_home_and_variables_are_expanded_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/somewhere/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    data = {"path": "~/a.beton", "test_path": "$SCRATCH/b.beton", "root": "${SCRATCH}/c", "source": "~/photos"}
    recipe = load({"data": data, "model": {"weights": "$SCRATCH/w.pth"}, "train": {"epochs": 1}})
    assert recipe.data.path == Path("/somewhere/me/a.beton")
    assert recipe.data.test_path == Path("/scratch/b.beton")
    assert recipe.data.root == Path("/scratch/c")
    assert recipe.data.source == "/somewhere/me/photos"
    assert recipe.model.weights == "/scratch/w.pth"
    monkeypatch.delenv("SCRATCH")
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load(tmp_path / "again.yaml") == recipe


def test_a_variable_that_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(UserError, match=r"data\.path: .*SCRATCH, which is not set"):
        load({"data": {"path": "$SCRATCH/a.beton"}, "train": {"epochs": 1}})


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ("batch_size=32", "data.batch_size or evaluate.batch_size"),
        ("batchsize=32", "data.batch_size or evaluate.batch_size"),
        ("lr=0.1", "optim.lr"),
        ("epochs=3", "train.epochs"),
        ("optimizer.lr=3", "optim"),
    ],
)
def test_a_key_without_its_section_names_the_dotted_one(change: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {near.replace('.', '[.]')}[?]"):
        load("quickstart", [change])


@pytest.mark.parametrize("change", ["data.path=''", "data.path=/", "data.test_path=''", "name=''", "name=."])
def test_a_path_or_run_without_a_name_is_refused(change: str) -> None:
    with pytest.raises(UserError, match=f"{change.partition('=')[0]}: .* names no"):
        load("quickstart", [change])


def test_a_dot_is_the_folder_that_it_stands_for() -> None:
    assert load("quickstart", ["data.path=."]).data.path == Path.cwd()
