"""What Python hands to `train`: a mistake names its argument in two sentences, before or without anything saved."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl import build
from fastssl.errors import OwnWarning, UserError
from fastssl.models import backbones
from fastssl.pretrained.evaluation.evaluate import evaluate
from fastssl.pretrained.export.export import export
from fastssl.recipe.load import load
from fastssl.training import own_parts


def small_backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Wide(nn.Module):
    """Gives float64, which no projector takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_backbone()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.inner(x)
        return features.double()


class Changing:
    """A loss with another term at every step."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, z_VBD: Tensor) -> dict[str, Tensor]:
        self.step += 1
        return {"loss": z_VBD.var(), "always": z_VBD.mean()} | ({"at_2": z_VBD.mean()} if self.step == 2 else {})


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda z: {"invariance": z.sum()}, 'without "loss"'),
        (lambda z: z.detach().sum(), "without a gradient"),
        (lambda z: torch.zeros(()), "without a gradient"),
        (lambda z: z.sum(0), "not a scalar"),
        (lambda z: 1.0, "a float for loss"),
        (lambda z: None, "a NoneType for loss"),
        (lambda z: {"loss": z.sum(), "note": "fine"}, "the term note"),
        (lambda z: {"loss": z.sum(), "step": z.mean()}, "a term called 'step'"),
        (lambda z: {"loss": z.sum(), "skipped": z.mean()}, "a term called 'skipped'"),
        (lambda z: {"loss": z.sum(), 1: z.mean()}, "a term called 1"),
        (lambda z: torch.fft.fft(z).sum(), "a complex number for loss"),
        (nn.Linear(16, 1), "a module with parameters"),
        (Changing(), "other terms in step 2 than before: at_2"),
        (3.0, "loss is a float"),
        (fastssl.losses.sigreg, "sigreg takes a seed"),
    ],
)
def test_a_loss_that_is_none_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path, loss: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        fastssl.train(tiny_recipe, run_dir=tmp_path / "run", loss=loss)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_no_term_takes_the_name_of_another_number(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    progressive = {"augment": tiny_recipe["augment"] | {"progressive": {"from_px": 8}}}
    fastssl.train(tiny_recipe | progressive, run_dir=tmp_path / "run", loss=lambda z: z[0].var() - z.var())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = {key for line in lines if line["event"] == "step" for key in line}
    assert written - {"loss"} == own_parts.TAKEN - {"skipped"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_with_an_infinite_loss_and_a_finite_gradient_is_left_out(
    tiny_recipe: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    settings = {"epochs": 1, "on_nonfinite": "skip", "precision": precision}
    tiny = tiny_recipe | {"train": tiny_recipe["train"] | settings}
    kept = small_backbone()
    before = {name: p.clone() for name, p in kept.named_parameters()}
    done = fastssl.train(tiny, run_dir=tmp_path / "run", backbone=kept, loss=lambda z: z.var() + float("inf"))
    assert done["skipped_steps"] == done["steps"] == 5
    assert all(torch.equal(p, before[name]) for name, p in kept.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_of_ones_own_is_given_float32(tiny_recipe: dict[str, Any], tmp_path: Path, precision: str) -> None:
    seen = set[torch.dtype]()

    def loss(z_VBD: Tensor) -> Tensor:
        seen.add(z_VBD.dtype)
        return z_VBD.square().mean()

    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 1, "precision": precision}}
    fastssl.train(tiny, run_dir=tmp_path / "run", loss=loss)
    assert seen == {torch.float32}


def test_fp16_whose_gradient_is_never_finite_ends(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Its scaler leaves out each of these steps by itself; the loss is finite."""
    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 12, "precision": "fp16"}}
    with pytest.raises(UserError, match=r"gradient is not finite at step 5[0-9]: gradient_norm nan"):
        fastssl.train(tiny, run_dir=tmp_path / "run", loss=lambda z: (z - z).square().sum().sqrt() + z.var())


def test_a_backbone_in_evaluation_mode_is_trained(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    backbone = small_backbone().eval()
    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 1}}
    with pytest.warns(OwnWarning, match="backbone is in evaluation mode"):
        fastssl.train(tiny, run_dir=tmp_path / "run", backbone=backbone)
    norm = backbone[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_mean.abs().max() > 0


class Center(nn.Module):
    """Subtracts a running mean, which images of zeros do not move."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


def test_a_buffer_that_zeros_leave_alone_is_found(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 8, 4, stride=4, bias=False)
    backbone = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Center())
    tiny = tiny_recipe | {"model": {"projector": [16], "batch_norm": "per_view"}}
    done = fastssl.train(tiny, run_dir=tmp_path / "run", backbone=backbone)
    assert done["parallel"] == "operators"


class Locked(nn.Sequential):
    """Cannot be copied, and keeps a plain tensor that no device but the CPU has."""

    def __init__(self) -> None:
        super().__init__(*small_backbone())
        self.lock, self.scale = threading.Lock(), torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            features: Tensor = super().forward(x) * self.scale
        return features


@pytest.mark.filterwarnings("ignore:Locked cannot be copied")  # where there is more than one core
def test_a_backbone_that_cannot_be_copied_trains_and_loads(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny = tiny_recipe | {"model": {"projector": [16], "batch_norm": "per_view"}}
    done = fastssl.train(tiny, run_dir=tmp_path / "run", backbone=Locked())
    assert done["parallel"] == "operators"
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    assert fastssl.load(tmp_path / "run", backbone=Locked(), device="cpu").embed(images).shape == (2, 8)
    with pytest.raises(UserError, match=r"optim\.ema .* cannot be copied"):
        fastssl.train(tiny | {"optim": {"ema": 0.9}}, run_dir=tmp_path / "ema", backbone=Locked())
    views = tiny | {"train": tiny["train"] | {"parallel": "views"}}
    with pytest.raises(UserError, match="parallel is views, but the backbone cannot be copied"):
        fastssl.train(views, run_dir=tmp_path / "views", backbone=Locked())


def test_buffers_of_ones_own_are_those_that_training_left(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(768, 8))
    backbone = nn.Sequential(nn.Flatten(), spectral)
    before = [buffer.clone() for buffer in backbone.buffers()]
    tiny = tiny_recipe | {"model": {"projector": [16], "batch_norm": "per_view"}}
    done = fastssl.train(tiny, run_dir=tmp_path / "run", backbone=backbone)
    assert done["parallel"] == "operators"
    assert not any(torch.equal(a, b) for a, b in zip(before, backbone.buffers(), strict=True))


class Named(nn.Module):
    """A backbone whose parts are called as a run's and a classifier's are."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = small_backbone(), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.fc(self.backbone(x))
        return features


@pytest.mark.parametrize("kind", [Named, nn.Flatten])
def test_a_backbone_of_ones_own_is_loaded_evaluated_and_exported(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: type[nn.Module]
) -> None:
    run, out = tmp_path / "run", tmp_path / "own.safetensors"
    fastssl.train(tiny_recipe, run_dir=run, backbone=kind())
    images = torch.arange(2 * 16 * 16 * 3).view(2, 16, 16, 3).to(torch.uint8)
    loaded = fastssl.load(run, backbone=kind(), device="cpu")
    record = evaluate(loaded, probes=["knn"])
    assert (record["run"], record["step"]) == (str(run), 10)
    with pytest.raises(UserError, match="evaluate, embed and export take what it gives"):
        evaluate(run)
    if kind is Named:
        export(loaded, out, to="safetensors")
        again = fastssl.load(out, backbone=kind(), device="cpu")
        assert (again.embed(images) == loaded.embed(images)).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"source": None}, "source is a NoneType"),
        ({"weights": "averaged"}, "weights is 'averaged'"),
        ({"checkpoint": 3}, "no checkpoint 3"),
        ({"backbone": 3}, "backbone is a int"),
        ({"backbone": nn.Conv2d(3, 8, 4)}, "not pooled features"),
        ({"backbone": Wide()}, "features of float64"),
    ],
)
def test_load_names_a_wrong_argument(tiny_run: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        fastssl.load(**{"source": tiny_run, "device": "cpu"} | arguments)


@pytest.mark.parametrize("val_count", [0, 40])
def test_a_loss_that_is_not_finite_is_named_before_its_features_are(
    tiny_recipe: dict[str, Any], tmp_path: Path, val_count: int
) -> None:
    rare = {
        "data": tiny_recipe["data"] | {"val_count": val_count},
        "train": tiny_recipe["train"] | {"log_every_steps": 100},
        "evaluate": tiny_recipe["evaluate"] | {"every_steps": 1},
    }
    with pytest.raises(UserError, match="not finite at step 1"):
        fastssl.train(tiny_recipe | rare, run_dir=tmp_path / "run", loss=lambda z: z.sum() * float("nan"))


def test_a_scalar_of_shape_one_will_do(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    def loss(z_VBD: Tensor) -> dict[str, Tensor]:
        return {"loss": (z_VBD[0] - z_VBD[1]).square().mean().reshape(1), "level": z_VBD.mean().detach()}

    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 1}}
    assert fastssl.train(tiny, run_dir=tmp_path / "run", loss=loss)["steps"] == 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"backbone": nn.Linear}, "backbone is the class Linear"),
        ({"backbone": lambda x: x}, "backbone is a function"),
        ({"backbone": nn.Linear(768, 8).double()}, "backbone.weight is float64"),
        ({"backbone": nn.Linear(768, 8, device="meta")}, "backbone.weight is on the device meta"),
        ({"policy": [{"side_px": "a"}, {}]}, "side_px is 'a'"),
        ({"policy": [{"side_px": None}] * 2}, "side_px is None"),
        ({"policy": [{"side_px": 16}, {"sidepx": 16}]}, "did you mean side_px"),
        ({"policy": "cifar"}, "policy is a str"),
        ({"policy": [16, 16]}, "A view is 16"),
        ({"policy": [fastssl.View(side_px=16)]}, "at least two"),
        ({"recipe": None}, "recipe is None"),
        ({"recipe": 3}, "recipe is 3"),
    ],
)
def test_mistakes_name_the_argument(
    tiny_recipe: dict[str, Any], tmp_path: Path, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        fastssl.train(**{"recipe": tiny_recipe, "run_dir": tmp_path / "run"} | arguments)
    assert not (tmp_path / "run").exists()


def test_a_backbone_next_to_model_weights_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_recipe | {"model": tiny_recipe["model"] | {"weights": "torchvision"}}
    with pytest.raises(UserError, match=r"model\.weights is torchvision, and backbone has weights of its own"):
        fastssl.train(recipe, run_dir=tmp_path / "run", backbone=nn.Flatten())


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_a_run_goes_on_with_the_loss_that_it_began_with(
    tiny_recipe: dict[str, Any], tmp_path: Path, first: bool, then: bool
) -> None:
    def apart(z_VBD: Tensor) -> Tensor:
        return (z_VBD[0] - z_VBD[1]).square().mean()

    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 1}, "optim": {"schedule": "constant"}}
    longer = tiny | {"train": tiny["train"] | {"epochs": 2}}
    fastssl.train(tiny, run_dir=tmp_path / "run", loss=apart if first else None)
    with pytest.raises(UserError, match="a loss from Python" if first else "the recipe's loss"):
        fastssl.train(longer, run_dir=tmp_path / "run", resume=True, loss=apart if then else None)
    done = fastssl.train(longer, run_dir=tmp_path / "run", resume=True, loss=apart if first else None)
    assert done["steps"] == 10


def test_a_policy_of_mappings_trains(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 1}}
    rows = [{"side_px": 16, "hflip_p": 0.5}] * 3
    assert fastssl.train(tiny, run_dir=tmp_path / "run", policy=rows)["views"] == 3 * 5 * 32


class Dropping(nn.Sequential):
    """A backbone whose dropout draws from torch's global random numbers."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16), nn.Dropout(0.3))


def test_dropout_follows_from_the_recipes_seed_and_the_callers_random_numbers_go_on(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    weights, losses = Dropping().state_dict(), []
    for seed in range(2):
        torch.manual_seed(seed)
        before, run, backbone = torch.get_rng_state(), tmp_path / str(seed), Dropping()
        torch.set_rng_state(before)
        backbone.load_state_dict(weights)
        fastssl.train(tiny_recipe, run_dir=run, backbone=backbone)
        fastssl.load(run, backbone=backbone)
        assert torch.equal(torch.get_rng_state(), before)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 10


def test_a_seed_decides_the_first_weights_and_nothing_else(tiny_recipe: dict[str, Any]) -> None:
    recipe, cpu = load(tiny_recipe), torch.device("cpu")
    torch.manual_seed(recipe.seed)
    expected = backbones.backbone("resnet_tiny", stem="patch2", width=0.25)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    network = build.model.network(recipe, in_channels=3, device=cpu)
    assert torch.equal(torch.get_rng_state(), before)
    for key, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key])
