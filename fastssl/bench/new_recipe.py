"""A commented recipe for a given data file and device.

Choice made: the settings are those of the shipped recipe nearest in device and image size; only what the data decides
(sides, channels, labels, batch, epochs) is changed, and a comment says why. Where the device is here, epochs come from
a measured step and the minutes asked for; where it is not, they are the shipped recipe's.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from fastssl import build
from fastssl.bench import dry_run
from fastssl.data.beton.reader import Beton
from fastssl.errors import UserError, errors_of, option, raise_all
from fastssl.models import resnet
from fastssl.recipe.json_schema import FILE_NAME, json_schema
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.runs.files import atomic_json, atomic_write

Device = Literal["cpu", "cuda"]
MAX_EPOCHS = 1000
STEPS_AN_EPOCH = 8  # at least, where the set allows it: cosine and warm-up need some
SMALLEST_BATCH = 16
VAL_SHARE, MOST_VAL = 0.1, 5000
FEW_LABELS = 2000


@dataclass(frozen=True)
class Template:
    """A shipped recipe and the images it is nearest to.

    Attributes:
        largest_px: of images, their shorter side, that it is chosen for.
        recipe: shipped recipe.
        view_px: the largest side of a view.
        view_share: side of a view over side of the image, before that limit.
    """

    largest_px: float
    recipe: str
    view_px: int
    view_share: float = 1.0


TEMPLATES: dict[Device, tuple[Template, ...]] = {
    "cpu": (Template(float("inf"), "cifar10_cpu.yaml", view_px=48, view_share=0.75),),
    "cuda": (
        Template(40, "cifar10_lowdim_muon.yaml", view_px=40),
        Template(128, "stl10_lowdim.yaml", view_px=64),
        Template(float("inf"), "imagenet100_lowdim.yaml", view_px=224),
    ),
}


@dataclass(frozen=True)
class Facts:
    """What a data file says: images, the median of their shorter sides, channels, labels, classes that have images."""

    path: Path
    count: int
    side_px: int
    one_size: bool
    channels: int
    labeled: int
    classes: int


def facts_of(path: Path) -> Facts:
    """Reads a .beton and its manifest.

    Raises:
        UserError: when it is not one, has no manifest, or holds fewer than 2 images.
    """
    if path.suffix != ".beton" or path.is_dir():
        make_it = f"fastssl convert {shlex.quote(str(path))} data/images.beton"
        raise UserError(f"{path} is not a .beton file.", f"Make one first with `{make_it}`.")
    beton, manifest = Beton(path), build.data.manifest_of(path)
    labels_N, sides_N = np.asarray(beton.labels), np.asarray(beton.sizes).min(axis=1)
    if len(labels_N) < 2:
        raise UserError(f"{path} holds {len(labels_N)} image; the losses compare images.", "Convert at least 2 images.")
    return Facts(
        path=path,
        count=len(labels_N),
        side_px=int(np.median(sides_N)),
        one_size=manifest.side_px is not None,
        channels=manifest.channels,
        labeled=int((labels_N >= 0).sum()),
        classes=len(np.unique(labels_N[labels_N >= 0])),
    )


def check_minutes(minutes: float | None) -> None:
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"{option('minutes')} is {minutes:g}.", f"Set {option('minutes')} above 0, to 60 for example.")


def unfit_out(out: Path) -> Iterator[UserError]:
    if out.suffix not in (".yaml", ".yml"):
        yield UserError(f"{option('out')} is {out}.", f"Give {option('out')} the suffix .yaml.")
    if out.exists():
        yield UserError(f"{out} is there already.", f"Choose another {option('out')}, or remove it.")
    if not out.parent.is_dir():
        yield UserError(f"{out.parent} is not a folder.", f"Make it, or choose another {option('out')}.")


def new_recipe(
    data: str | Path,
    *,
    device: Device | None = None,
    minutes: float | None = None,
    backbone: str | None = None,
    out: str | Path = "THIS.yaml",
) -> str:
    """The text of a commented recipe that validates and trains on `data`.

    Args:
        data: a .beton file with its manifest.
        device: "cpu" or "cuda"; what this machine has when None.
        minutes: of training, > 0, to choose epochs by; None is 10 on a CPU and 60 on a GPU.
        backbone: such as "resnet18", "torchvision/NAME" or "timm/NAME"; the shipped recipe's when None.
        out: where the text will lie, for the commands in its comments.

    Raises:
        UserError: when the file cannot be read or trained on, or the backbone is unknown or takes no such views.
    """
    facts = facts_of(Path(data))
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    device = device or here
    if device == "cuda" and here != "cuda" and minutes is not None:
        raise UserError(
            f"{option('minutes')} is given for a GPU, and there is none here to measure a step on.",
            f"Leave {option('minutes')} out, or write the recipe on the machine that trains.",
        )
    minutes = minutes if minutes is not None else {"cpu": 10.0, "cuda": 60.0}[device]
    check_minutes(minutes)
    template = next(t for t in TEMPLATES[device] if facts.side_px <= t.largest_px)
    base = with_backbone(load(template.recipe), facts, template, device=device, backbone=backbone)
    write = partial(written, facts, template, device=device, own_backbone=backbone is not None, out=Path(out))
    text = write(base, epochs=base.train.epochs, why="as there")
    if device == "cuda" and here != "cuda":
        why = "as there: no GPU here to measure on; fastssl train --dry-run on the GPU estimates the minutes"
        return write(base, epochs=base.train.epochs, why=why)
    images_s = dry_run.images_per_second(load(yaml.safe_load(text)), facts.channels)
    per_epoch_s = (facts.count - val_count(facts)) / images_s
    epochs = max(1, min(MAX_EPOCHS, round(minutes * 60 / per_epoch_s)))
    how = "measured without torch.compile" if base.train.compile else "measured"
    why = f"about {epochs * per_epoch_s / 60:.2g} min of steps here ({how}; {minutes:g} asked for), probes apart"
    return write(base, epochs=epochs, why=why)


def with_backbone(base: Recipe, facts: Facts, template: Template, *, device: Device, backbone: str | None) -> Recipe:
    """The shipped recipe with a stem for these views, and the backbone asked for with the first stem that it takes.

    Raises:
        UserError: when the backbone is unknown, or takes no such views.
    """
    view_px = view_side_px(facts, template)
    usual = "patch4" if device == "cpu" and view_px > 32 else base.model.stem
    if backbone is None:
        return load(base, [f"model.stem={usual}"])
    sides = [f"augment.side_px={view_px}", f"evaluate.side_px={clean_side_px(facts, template)}", "device=cpu"]
    for stem in (usual, "auto"):
        changes = [f"model.backbone={backbone}", "model.width=1", f"model.stem={stem}"]
        tried = load(base, [*changes, *sides])
        build.model.check_model(tried)
        try:
            with torch.device("meta"):
                build.model.network(tried, in_channels=facts.channels, device=torch.device("meta"))
        except (UserError, AssertionError, RuntimeError, ValueError):  # whatever a library says of sides and patches
            continue
        return load(base, changes)
    raise UserError(
        f"{backbone} takes no views of {view_px} px.", f"Choose another {option('backbone')}, or convert larger images."
    )


def write_new(
    data: str | Path,
    out: str | Path,
    *,
    device: Device | None = None,
    minutes: float | None = None,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Writes the recipe, and next to it the schema that its first line names; returns what was chosen.

    Raises:
        UserError: as `new_recipe`; when `out` is there or cannot be written.
    """
    out = Path(out)
    raise_all([*unfit_out(out), *errors_of(lambda: facts_of(Path(data)), lambda: check_minutes(minutes))])
    text = new_recipe(data, device=device, minutes=minutes, backbone=backbone, out=out)
    recipe = load({**yaml.safe_load(text), "name": out.stem})
    atomic_json(out.parent / FILE_NAME, json_schema())
    atomic_write(out, text)
    return {
        "recipe": str(out),
        "schema": str(out.parent / FILE_NAME),
        "backbone": recipe.model.backbone,
        "hub": "/" in recipe.model.backbone or (resnet.in_hubs(recipe.model.backbone) and recipe.model.width == 1),
        "epochs": recipe.train.epochs,
        "batch_size": recipe.data.batch_size,
        "val_count": recipe.data.val_count,
        "view_side_px": recipe.augment.side_px,
    }


def val_count(facts: Facts) -> int:
    """Labeled images to hold out: a tenth, none where there are not two classes to distinguish."""
    return min(MOST_VAL, int(facts.labeled * VAL_SHARE)) if facts.classes > 1 else 0


def batch_size(facts: Facts, template: int) -> int:
    """The template's, or the power of two below it that leaves STEPS_AN_EPOCH, SMALLEST_BATCH or the set at least."""
    images = facts.count - val_count(facts)
    power = 1 << max(0, (images // STEPS_AN_EPOCH).bit_length() - 1)
    return max(2, min(template, images, max(SMALLEST_BATCH, power)))


def view_side_px(facts: Facts, template: Template) -> int:
    """A multiple of 4 where there is room."""
    side = min(template.view_px, int(facts.side_px * template.view_share))
    return max(4, side - side % 4)


def clean_side_px(facts: Facts, template: Template) -> int:
    """Of evaluation: a crop shows things larger than the whole image does, so views at 3/4 of the side seen there.

    A multiple of 4, which patches divide, where there is room.
    """
    return min(facts.side_px, 4 * round(view_side_px(facts, template) / template.view_share / 4))


def changes_of_views(facts: Facts, base: Recipe) -> dict[str, Any]:
    changed = dict(base.augment.all)
    if facts.channels != 3:
        changed = {key: value for key, value in changed.items() if key not in ("hue", "saturation")}
        changed |= {"jitter_p": 0, "gray_p": 0}
    return changed


def written(
    facts: Facts,
    template: Template,
    base: Recipe,
    *,
    device: Device,
    epochs: int,
    why: str,
    own_backbone: bool,
    out: Path,
) -> str:
    """The recipe's text. Each value is either the shipped recipe's or explained in a comment."""
    held_out, batch = val_count(facts), batch_size(facts, base.data.batch_size)
    view_px, clean_px = view_side_px(facts, template), clean_side_px(facts, template)
    labels = f"{facts.labeled:,} of {facts.classes} classes" if facts.labeled else "none"
    sizes = f"{facts.side_px} px" if facts.one_size else f"of different sizes, half of them {facts.side_px} px or more"
    channels = "1 channel" if facts.channels == 1 else f"{facts.channels} channels"
    optim, loss = base.optim, base.loss
    command, asked = f"fastssl train {shlex.quote(str(out))}", "  # as asked for" if own_backbone else ""
    compiled = f"\n  compile: {str(base.train.compile).lower()}" if base.train.compile else ""
    compiled += "\n  cuda_graph: true  # the whole step is launched at once" if base.train.cuda_graph else ""
    return f"""\
# yaml-language-server: $schema={FILE_NAME}
# Images: {facts.count:,}, {sizes}, {channels}; labels: {labels}.
# Source: the shipped {template.recipe}, but for what a comment explains; not measured on these images.
# See it: {command} --dry-run
# Train: {command}
device: {device}
data:
  path: {quoted(str(facts.path))}
  # test_path: a second .beton of labeled test images, looked at once, at the end
  val_count: {held_out}  # {why_val(facts, held_out)}
  batch_size: {batch}  # {why_batch(batch, base.data.batch_size)}
augment:
  preset: {base.augment.preset}  # crops, mirroring, color; what varies between views is what features will ignore
  views: {base.augment.views}
  side_px: {view_px}  # {why_view(facts, template)}
  all: {flow(changes_of_views(facts, base))}  # {why_all(facts)}
model:
  backbone: {base.model.backbone}{asked}
  stem: {base.model.stem}  # the first convolution; a larger patch is faster and coarser
  projector: {flow(list(base.model.projector))}  # the last width is D{why_norm(base)}
loss:
  name: {loss.name}  # {build.losses.LOSSES[loss.name].label}
{weights_of(base)}{choices_of(base)}
optim:
  name: {optim.name}
  lr: {number(optim.lr)}
  weight_decay: {number(optim.weight_decay)}{why_rate(base)}
  schedule: {optim.schedule}
  warmup_epochs: {number(min(optim.warmup_epochs, epochs / 5))}
train:
  epochs: {epochs}  # {why}
  precision: {base.train.precision}{compiled}
evaluate:
  every_epochs: {max(1, epochs // 10)}
  side_px: {clean_px}  # of the whole image, as the probes and your own features see it
  knn_k: {"[20, 200]" if facts.labeled - held_out >= FEW_LABELS else "[5, 20]"}
"""


def why_rate(base: Recipe) -> str:
    """The line of LARS's momentum, where it is not the default."""
    if base.optim.rate_in_momentum:
        return ""
    return "\n  rate_in_momentum: false  # the rate scales what leaves the momentum, as in the losses' own codes"


def why_norm(base: Recipe) -> str:
    """The line of batch norm, where it is not the default."""
    if base.model.batch_norm == "joint":
        return ""
    return f"\n  batch_norm: {base.model.batch_norm}  # of each view by itself: threads share whole views"


def weights_of(base: Recipe) -> str:
    """Every weight of the loss as auto: one that was tuned on other images would be a guess here."""
    names = build.losses.weights(base, base.model.projector[-1])
    lines = [f"  {name}: auto" for name in names]
    return "\n".join([f"{lines[0]}  # scaled to D and to the number of views", *lines[1:]])


def choices_of(base: Recipe) -> str:
    """The loss's other settings that are not its defaults."""
    usual, weights = type(base.loss)(), build.losses.weights(base, base.model.projector[-1])
    chosen = {name: value for name, value in base.loss.model_dump().items() if value != getattr(usual, name)}
    return "".join(f"\n  {flow({name: value})[1:-1]}" for name, value in chosen.items() if name not in weights)


def why_val(facts: Facts, held_out: int) -> str:
    if facts.classes > 1 and held_out:
        return f"labeled images held out to watch accuracy by, {VAL_SHARE:.0%} and {MOST_VAL:,} at most"
    return "no accuracy while training: " + ("too few labels" if facts.classes > 1 else "there are no two classes")


def why_batch(batch: int, usual: int) -> str:
    return "images, not views" if batch == usual else f"images, not views; {usual} there, but this set is small"


def why_view(facts: Facts, template: Template) -> str:
    if template.view_share < 1:
        return (
            f"{template.view_share:.0%} of the image's side, {template.view_px} at most: pixels are what a step costs"
        )
    return f"the image's side, {template.view_px} at most"


def why_all(facts: Facts) -> str:
    if facts.channels != 3:
        return "jitter and grayscale act on 3 channels only"
    return "add hflip_p: 0 where left and right matter, such as for writing"


def quoted(text: str) -> str:
    """A string as YAML in one line."""
    return str(yaml.safe_dump(text, default_style='"', width=10**6, allow_unicode=True)).strip()


def flow(value: Any) -> str:
    """A list or mapping of plain values as YAML in one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)).strip()


def number(value: float) -> str:
    """Short, and a number to every reader of YAML (1e-06 is a string to some)."""
    text = f"{value:.4g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
