"""Changes of a network that no setting expresses: each has an effect, and runs are made and kept like the record's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import one_torch_thread
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import networks
from record import BASE

from fastssl.data.beton.reader import Beton
from fastssl.models.backbones import backbone
from fastssl.recipe.load import load


def features(name: str, trial: str, recipe: dict[str, Any]) -> Tensor:
    """Of 24-pixel images, by a network of seed 0 in training mode."""
    torch.manual_seed(0)
    net = backbone(name, stem="patch2", width=0.5)
    for edit in networks.TRIALS[trial]:
        edit(net, load(recipe))
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    out: Tensor = net.train()(images)
    return out


@pytest.mark.parametrize("trial", [name for name in networks.TRIALS if name != BASE])
def test_every_change_has_an_effect(trial: str, tiny_recipe: dict[str, Any]):
    changed, base = (features("resnet_small", name, tiny_recipe) for name in (trial, BASE))
    dims = {"1,024": 1024, "of two stages": 64 + 128, "of all stages": 2 * (32 + 64 + 128)}
    assert changed.shape == (6, next((dim for part, dim in dims.items() if part in trial), 128))
    assert changed.shape != base.shape or not torch.equal(changed, base)


def test_averaging_between_stages_is_what_the_package_has(tiny_recipe: dict[str, Any]):
    expected = features("resnet_small", "averaging between stages", tiny_recipe)
    assert torch.equal(features("resnet_pool", BASE, tiny_recipe), expected)


def test_all_that_was_taken_over_is_what_the_package_has(tiny_recipe: dict[str, Any]):
    trial = "stem 4x4, averaging, normed moments of all stages"
    ours, theirs = backbone("resnet_compact", stem="patch2"), backbone("resnet_small", stem="patch2")
    for edit in networks.TRIALS[trial]:
        edit(theirs, load(tiny_recipe))
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(4, 3, 24, 24)
    torch.testing.assert_close(ours(images), theirs(images))


def test_whitening_filters_see_uncorrelated_directions_of_equal_variance(tiny_recipe: dict[str, Any]):
    net, recipe = backbone("resnet_small", stem="patch2"), load(tiny_recipe)
    networks.whitening(net, recipe)
    images = Beton(recipe.data.path)
    pixels = torch.stack([torch.from_numpy(images.image(i).copy()) for i in range(len(images))]).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    patches = nn.functional.unfold(((pixels - mean) / std).permute(0, 3, 1, 2), 2).transpose(0, 1).flatten(1)
    filters = net.conv1.weight.detach().flatten(1)
    assert torch.equal(filters[12:24], -filters[:12])
    variances = torch.linalg.eigvalsh(torch.cov(patches)).flip(0)
    expected = (variances / (variances + 5e-4)).diag()  # one, but for directions that hardly vary
    torch.testing.assert_close(torch.cov(filters[:12] @ patches) / 0.3**2, expected, rtol=0, atol=1e-3)


def test_the_command_trains_once_and_says_the_gains(tiny_recipe: dict[str, Any], tmp_path: Path):
    path, out = tmp_path / "base.yaml", tmp_path / "networks.json"
    model = tiny_recipe["model"] | {"stem": "patch2"}
    path.write_text(yaml.safe_dump(tiny_recipe | {"model": model, "evaluate": {"knn_k": [20], "linear_epochs": 0}}))
    words = [str(path), "--out", str(tmp_path / "runs"), "--json", str(out)]
    with one_torch_thread():
        networks.main([*words, "--only", "no last ReLU"])
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")}
        networks.main([*words, "--only", "batch norm of features"])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    found = {(row["impl"], row["metric"]): row for row in json.loads(out.read_text())["rows"]}
    assert {impl for impl, _ in found} == {BASE, "no last ReLU", "batch norm of features"}
    for name in ("no last ReLU", "batch norm of features"):
        own, base = (found[impl, "val_knn20_pct"]["values"][0] for impl in (name, BASE))
        assert found[name, "gain_knn20_pct"]["values"] == [pytest.approx(own - base)]
