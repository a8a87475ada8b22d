"""Which backend makes the views: the device's own where that runs, and never in silence another."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastssl
from fastssl.augment.backend import backend_of
from fastssl.bench import doctor
from fastssl.bench.dry_run import describe
from fastssl.bench.stages import recipe_stages
from fastssl.build import views
from fastssl.build.data import manifest_of
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA backend works here")


def test_auto_is_the_backend_of_the_device(tiny_recipe: dict[str, Any]):
    recipe = load(tiny_recipe)
    chosen = {kind: views.backend_name(recipe, torch.device(kind)) for kind in ("cpu", "cuda", "mps")}
    assert chosen == {"cpu": "cpu", "cuda": "cuda", "mps": "torch"}
    assert views.backend_name(load(tiny_recipe, ["augment.backend=torch"]), torch.device("cpu")) == "torch"


def test_fused_backends_take_resident_images_in_place(tiny_recipe: dict[str, Any]):
    for name in ("torch", "cpu", "cuda"):
        recipe = load(tiny_recipe, [f"augment.backend={name}"])
        assert views.reads_in_place(recipe, torch.device("cpu")) == (name != "torch")


VERBS: dict[str, Callable[[Recipe], object]] = {
    "train": fastssl.train,
    "dry run": describe,
    "bench": recipe_stages,
    "views": lambda recipe: fastssl.views(recipe.data.path, batch_size=32, backend="cuda", device="cpu"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_backend_for_another_device_is_refused(tiny_recipe: dict[str, Any], verb: str):
    with pytest.raises(UserError, match=r"augment\.backend is cuda, but the device is cpu\.") as error:
        VERBS[verb](load(tiny_recipe, ["augment.backend=cuda"]))
    assert error.value.fix == "Set augment.backend to auto or torch, or device to cuda."
    with pytest.raises(UserError, match=r"augment\.backend is cpu, but the device is cuda"):
        views.check_backend(load(tiny_recipe, ["augment.backend=cpu"]), torch.device("cuda"))


def test_a_backend_that_is_not_installed_is_refused(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fastssl.augment.cuda.backend", raising=False)
    with pytest.raises(UserError, match="but triton is not installed"):
        views.check_backend(load(tiny_recipe, ["augment.backend=cuda"]), torch.device("cuda"))


def test_a_run_of_another_device_is_looked_at_with_ones_own_backend(tiny_recipe: dict[str, Any]):
    recipe, device = load(tiny_recipe, ["augment.backend=cuda"]), torch.device("cpu")
    assert views.clean_view(recipe, manifest_of(recipe.data.path), device=device).backend == backend_of("cpu")


def test_the_recipes_normalization_takes_the_place_of_the_datas(tiny_recipe: dict[str, Any]):
    recipe, device = load(tiny_recipe), torch.device("cpu")
    manifest = manifest_of(recipe.data.path)
    own = views.augment(recipe, manifest, device=device)
    assert (own.mean_C, own.std_C) == (manifest.mean, manifest.std)
    given = load(recipe, ["augment.mean=[0.1, 0.2, 0.3]", "augment.std=[0.5, 0.6, 0.7]"])
    for cut in (views.augment, views.clean_view):
        augment = cut(given, manifest, device=device)
        assert (augment.mean_C, augment.std_C) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    with pytest.raises(UserError, match=r"augment\.std has 1 values, but the images have 3 channels"):
        views.augment(load(recipe, ["augment.std=[0.5]"]), manifest, device=device)


@NO_GPU
def test_auto_falls_back_to_torch_and_says_why_in_two_lines(tiny_recipe: dict[str, Any]):
    """Kernels that do not compile, a driver that is absent: whatever is wrong shows before the first step."""
    recipe, device = load(tiny_recipe), torch.device("cuda")
    augment = views.augment(recipe, manifest_of(recipe.data.path), device=device)
    assert augment.backend == backend_of("torch")
    warning = views.fallback(recipe, augment, device=device)
    assert warning is not None
    first, second = warning.splitlines()
    assert str(views.cuda_failure(augment, device)) in first
    assert "augment.backend" in second


def test_nothing_is_said_where_the_recipe_decides(tiny_recipe: dict[str, Any]):
    recipe, device = load(tiny_recipe, ["augment.backend=torch"]), torch.device("cuda")
    augment = views.augment(recipe, manifest_of(recipe.data.path), device=device)
    assert views.fallback(recipe, augment, device=device) is None


@NO_GPU
def test_doctor_names_the_backend_and_the_reason():
    check = doctor.fused_kernels(torch.device("cuda"))
    assert (check.kind, check.name, check.works) == ("augmentation", "auto", False)
    assert check.detail.startswith("the torch backend: ")
