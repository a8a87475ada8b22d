"""The whole evaluation: split, features once, every probe on every layer and number of labels, with intervals.

An interval is Wilson's over the judged images: what other images of the same kind might have given. It says
nothing about another seed of the training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastssl import build
from fastssl.errors import UserError, option, raise_all
from fastssl.pretrained.evaluation.features import LAYERS, Key, Progress, at_side, features
from fastssl.pretrained.evaluation.finetune import finetune
from fastssl.pretrained.evaluation.splits import On, OnError, Part, splits
from fastssl.pretrained.evaluation.unlabeled import figures_by_layer, pretraining_part
from fastssl.pretrained.load import Pretrained, load
from fastssl.probes import evaluate as measures
from fastssl.probes import table
from fastssl.recipe.schema import MAX_VIEW_PX, Recipe
from fastssl.runs.environment import environment
from fastssl.runs.files import json_text
from fastssl.training.guards import evaluation_explained
from fastssl.training.plain import plain_torch
from fastssl.training.threads import within_cores

FINETUNE = "finetune"
PROBES = (*(probe.name for probe in table.ACCURACIES), FINETUNE)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MAX_VIEWS = 256
LINEAR_EPOCHS, TUNED_EPOCHS, TUNED_LR = 200, 10, 1e-3


@plain_torch()
@within_cores()
def evaluate(
    run: str | Path | Pretrained,
    *,
    recipe: str | Path | Recipe | None = None,
    data: str | Path | None = None,
    test: str | Path | None = None,
    on: On | None = None,
    probes: Sequence[str] = ("knn", "ridge", "linear"),
    views: Sequence[int] = (1,),
    layers: Sequence[str] = ("backbone",),
    few_label_pct: Sequence[float] = (),
    linear_epochs: int = LINEAR_EPOCHS,
    finetune_epochs: int = TUNED_EPOCHS,
    finetune_lr: float = TUNED_LR,
    device: str = "auto",
    checkpoint: str | Path = "last",
    side_px: int | None = None,
    on_error: OnError = "fail",
    download: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates one of a run's checkpoints, or a weights file.

    Args:
        run: what `train` wrote, a checkpoint in it, a .safetensors file, or what `load` gave, for which recipe, device
            and checkpoint are not used.
        recipe: how weights outside of a run were trained.
        data: another data set's labeled train file; the run's own when absent.
        test: its labeled test file.
        on: "val", "test", or "pretraining" for the figures that need no label. None is "test" when `test` is given,
            "pretraining" when the run's own images have no labels, else "val": a choice must not see the test set.
        probes: of "knn", "whitened_knn", "ridge", "linear" and "finetune".
        views: numbers of views whose mean feature is used, 1 to 256.
        layers: "backbone", "projector".
        few_label_pct: also learn from these shares of the labels, percent in (0, 100).
        linear_epochs: passes of the linear probe over its images.
        finetune_epochs: passes of fine-tuning over its images.
        finetune_lr: learning rate of fine-tuning.
        device: "auto", "cpu", "cuda" or "mps".
        checkpoint: of a run: "last", "best" or a checkpoint's folder.
        side_px: of the images that the network is given, 4 to 1024; the run's own, see evaluate.side_px, when absent.
        on_error: "fail" after listing the images of a source that cannot be read, or "skip" them.
        download: allowed to fetch cifar10, cifar100 or stl10 as `data` or `test` when absent.
        progress: called with (file name, images done, images in all) while features are extracted.

    Returns:
        One record: what was evaluated, "rows" with an accuracy and its 95 % interval each, and "spectrum", the
        figures of the clean features by layer. It is also appended to evaluations.jsonl of the run.

    Raises:
        UserError: for everything a person can fix.
    """
    raise_all(
        [
            *unfit_lists(probes=probes, views=views, layers=layers, few_label_pct=few_label_pct),
            *unfit_training(linear_epochs=linear_epochs, finetune_epochs=finetune_epochs, finetune_lr=finetune_lr),
            *unknown(on=on, on_error=on_error),
            *unfit_side(side_px),
        ]
    )
    probes, views, layers = [*dict.fromkeys(probes)], [*dict.fromkeys(views)], [*dict.fromkeys(layers)]
    few_label_pct = [*dict.fromkeys(few_label_pct)]
    net = run if isinstance(run, Pretrained) else load(run, device=device, recipe=recipe, checkpoint=checkpoint)
    net = replace(net, recipe=build.run_data.located(net.recipe, net.run_dir))
    net = net if side_px is None else at_side(net, side_px)
    if "projector" in layers and net.projector is None:
        raise UserError(
            "These weights hold the backbone alone.", f"Leave {option('layers')} at backbone, or give the run."
        )
    on = on or default_on(net, data=data, test=test)
    folder = net.run_dir / "features" if net.run_dir else None
    lack = evaluation_explained(net.recipe, where=f" in {net.run_dir / 'recipe.yaml'}" if net.run_dir else "")
    if on == "pretraining":
        refuse_labels(data=data, test=test, probe=probes, views=views, few_label=few_label_pct)
        part = pretraining_part(net)
        with lack:
            figures = figures_by_layer(net, part, layers=layers, folder=folder, progress=progress)
        return remembered(net, record_of(net, run, on=on, judged=part, figures=figures))
    train, judged = splits(net, data=data, test=test, on=on, folder=folder, on_error=on_error, download=download)
    frozen = [probe for probe in probes if probe != FINETUNE]
    with_clean = sorted({1, *views})
    with lack:
        learned, tested = (
            features(net, part, views=counts, layers=layers, folder=folder, progress=progress)
            for part, counts in ((train, views), (judged, with_clean))
        )
    shares = [100.0, *few_label_pct]
    rows = [
        row
        for share in shares
        for row in (
            *frozen_rows(
                frozen,
                learned,
                tested,
                train,
                judged,
                share,
                knn_k=net.recipe.evaluate.knn_k,
                linear_epochs=linear_epochs,
                progress=progress,
            ),
            *(
                tuned_rows(net, train, judged, share, epochs=finetune_epochs, lr=finetune_lr, progress=progress)
                if FINETUNE in probes
                else ()
            ),
        )
    ]
    figures = {layer: table.figures(tested[1, layer]) for layer in layers}
    remarks = [*table.remarks(figures[layers[0]]).values(), *remarks_of(rows)]
    record = record_of(net, run, on=on, judged=judged, figures=figures, rows=rows, train=train)
    useless = without_effect(
        rows, linear_epochs=linear_epochs, finetune_epochs=finetune_epochs, finetune_lr=finetune_lr
    )
    remarks = [*dict.fromkeys((*train.remarks, *judged.remarks)), *remarks, *useless]
    return remembered(net, record | {"warnings": list(dict.fromkeys([*remarks, *record["warnings"]]))})


def refuse_labels(**given: Any) -> None:
    """UserError for what asks for labels where figures without labels are asked for."""
    usual = {"data": None, "test": None, "probe": ("knn", "ridge", "linear"), "views": (1,), "few_label": ()}
    names = {"probe": "probes", "few_label": "few_label_pct"}
    listed = {name: tuple(value) if isinstance(usual[name], tuple) else value for name, value in given.items()}
    idle = [option(names.get(name, name), flag=name) for name, value in listed.items() if value != usual[name]]
    if idle:
        it = "it" if len(idle) == 1 else "them"
        raise UserError(
            f"{' and '.join(idle)}: the figures of the pretraining images have no use for {it}.",
            f"Leave {it} out, or judge by labeled images: {option('data')} FILE {option('on', 'val')}.",
        )


def remarks_of(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was capped or could not be chosen, for each share of the labels."""
    for share in dict.fromkeys(row["label_share_pct"] for row in rows):
        metrics = {key: value for row in rows if row["label_share_pct"] == share for key, value in row.items()}
        before = "" if share == 100 else f"With {share:g} % of the labels: "
        yield from (before + text for text in table.remarks(metrics).values())


def default_on(net: Pretrained, *, data: str | Path | None, test: str | Path | None) -> On:
    """What a run is judged on when nobody says."""
    if test is not None:
        return "test"
    labeled = net.recipe.data.probe_path or net.recipe.data.path
    if data is None and labeled.is_file() and not bool((build.data.labels_of(labeled) >= 0).any()):
        return "pretraining"
    return "val"


def record_of(
    net: Pretrained,
    run: str | Path | Pretrained,
    *,
    on: On,
    judged: Part,
    figures: dict[str, dict[str, float]],
    rows: Sequence[dict[str, Any]] = (),
    train: Part | None = None,
) -> dict[str, Any]:
    """What was evaluated, the accuracies, and the figures without labels by layer."""
    return {
        "event": "evaluate",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": str(run if isinstance(run, str | Path) else net.run_dir),
        "weights": net.digest,
        "step": net.step,
        "averaged": net.weights == "ema",
        "on": on,
        "train": described(train) if train else None,
        "judged": described(judged),
        "side_px": net.clean.views[0].side_px,
        "rows": list(rows),
        "spectrum": figures,
        "precision": str(net.autocast or torch.float32).removeprefix("torch."),
        "warnings": [
            *filter(None, [build.hardware.replaced(net.recipe, net.device)]),
            *(text for metrics in figures.values() for text in table.remarks(metrics).values()),
        ],
        "environment": environment(),
    }


def remembered(net: Pretrained, record: dict[str, Any]) -> dict[str, Any]:
    """The record, appended to evaluations.jsonl of the run."""
    problem = keep(record, net.run_dir / "evaluations.jsonl") if net.run_dir else None
    return record | ({"not_kept": problem} if problem else {})


def keep(record: dict[str, Any], path: Path) -> str | None:
    """Append a record to a file; a sentence where that cannot be written, since the result is worth more."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_text(record) + "\n")
    except OSError as error:
        return f"The result and its features are not kept in {path.parent}: {error.strerror or error}."
    return None


def unfit_lists(
    *, probes: Sequence[str], views: Sequence[int], layers: Sequence[str], few_label_pct: Sequence[float]
) -> Iterator[UserError]:
    """What is no list, and lists of what cannot be computed."""
    lists = {"probes": probes, "views": views, "layers": layers, "few_label_pct": few_label_pct}
    no_lists = [name for name, value in lists.items() if isinstance(value, str) or not isinstance(value, Sequence)]
    for name in no_lists:
        yield UserError(f"{name} is {lists[name]!r}, not a list.", f"Pass a list: [{lists[name]!r}].")
    if no_lists:
        return
    for name, chosen, known in ((option("probes", flag="probe"), probes, PROBES), (option("layers"), layers, LAYERS)):
        wrong = [str(value) for value in chosen if value not in known]
        if wrong or not chosen:
            yield UserError(f"{name} {','.join(wrong) or 'is empty'}.", f"Choose of {', '.join(known)}.")
    if not views or not all(isinstance(count, Integral) and 1 <= count <= MAX_VIEWS for count in views):
        given = ",".join(map(str, views)) or "is empty"
        yield UserError(f"{option('views')} {given}.", f"Give whole numbers from 1 to {MAX_VIEWS}, such as 1,16.")
    if not all(isinstance(share, Real) and 0 < share < 100 for share in few_label_pct):
        given = ",".join(map(str, few_label_pct))
        name = option("few_label_pct", flag="few_label")
        yield UserError(f"{name} {given}.", "Give percentages between 0 and 100, such as 1,10.")


def unfit_training(*, linear_epochs: int, finetune_epochs: int, finetune_lr: float) -> Iterator[UserError]:
    """What a classifier cannot be trained with."""
    for name, epochs in (("linear_epochs", linear_epochs), ("finetune_epochs", finetune_epochs)):
        if epochs < 1:
            yield UserError(f"{option(name, epochs)}.", f"Set {option(name)} to 1 or more.")
    if not 0 < finetune_lr < float("inf"):
        yield UserError(
            f"{option('finetune_lr', finetune_lr)}.", f"Set {option('finetune_lr')} above 0, to 0.001 for example."
        )


def unfit_side(side_px: Any) -> Iterator[UserError]:
    """What is no side of an image."""
    if side_px is not None and not (isinstance(side_px, Integral) and 4 <= int(side_px) <= MAX_VIEW_PX):
        yield UserError(
            f"{option('side_px', side_px)}.", f"Set {option('side_px')} to 4 to {MAX_VIEW_PX}, or leave it out."
        )


def without_effect(rows: Sequence[dict[str, Any]], **given: float) -> Iterator[str]:
    """A sentence for each setting of a probe that has no row."""
    for name, usual in (("linear_epochs", LINEAR_EPOCHS), ("finetune_epochs", TUNED_EPOCHS), ("finetune_lr", TUNED_LR)):
        probe = name.partition("_")[0]
        if given[name] != usual and probe not in {row["probe"] for row in rows}:
            yield f"{option(name)} changes nothing: {probe} is not among the probes."


def unknown(*, on: Any, on_error: Any) -> Iterator[UserError]:
    """Choices that there are none of."""
    if on is not None and on not in get_args(On):
        yield UserError(f"{option('on', on)}.", f"Choose {', '.join(get_args(On))}.")
    if on_error not in get_args(OnError):
        yield UserError(f"{option('on_error', on_error)}.", f"Choose {', '.join(get_args(OnError))}.")


def frozen_rows(
    probes: Sequence[str],
    learned: dict[Key, Tensor],
    tested: dict[Key, Tensor],
    train: Part,
    judged: Part,
    share_pct: float,
    *,
    knn_k: Sequence[int],
    linear_epochs: int,
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:
    """One row for each probe of frozen features, number of views and layer."""
    few = positions(train, share_pct)
    for (count, layer), train_NF in learned.items():
        device = train_NF.device
        few_NF, few_labels_N = train_NF[few.to(device)], train.labels_N[few].to(device)
        labeled = measures.Labeled(
            few_NF,
            few_labels_N,
            tested[count, layer],
            judged.labels_N.to(device),
            knn_k=knn_k,
            linear_epochs=linear_epochs,
            learning_rates=LEARNING_RATES,
            whitened_knn=True,
            progress=progress,
        )
        for probe in probes:
            metrics = table.accuracies(labeled, names=[probe])
            chosen = {name: value for name, value in metrics.items() if not name.endswith("_pct")}
            for name, value in metrics.items():
                if name.endswith("_pct"):
                    passes = {"linear_epochs": linear_epochs} if probe == "linear" else {}
                    place = {"views": count, "layer": layer} | passes
                    yield row(name, value, judged, len(few), share_pct) | place | chosen


def tuned_rows(
    net: Pretrained,
    train: Part,
    judged: Part,
    share_pct: float,
    *,
    epochs: int,
    lr: float,
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:
    """The row of fine-tuning."""
    few = train.pick(positions(train, share_pct))
    value, epochs = finetune(net, few, judged, epochs=epochs, lr=lr, progress=progress)
    tuned = row("finetune_pct", value, judged, len(few.rows_N), share_pct)
    yield tuned | {"views": 1, "layer": "whole network", "finetune_epochs": epochs, "finetune_lr": lr}


def positions(train: Part, share_pct: float) -> Tensor:
    if share_pct == 100:
        return torch.arange(len(train.labels_N))
    return measures.few_labels(train.labels_N, share_pct / 100)


def row(name: str, value_pct: float, judged: Part, train_images: int, share_pct: float) -> dict[str, Any]:
    low, high = measures.interval_pct(value_pct, len(judged.labels_N))
    return {
        "probe": name.removesuffix("_pct"),
        "pct": round(value_pct, 4),
        "low_pct": round(low, 4),
        "high_pct": round(high, 4),
        "label_share_pct": share_pct,
        "train_images": train_images,
        "images": len(judged.labels_N),
    }


def described(part: Part) -> dict[str, Any]:
    """Path, number of images and digest; of a source that was converted for it also what it held."""
    record = {"path": str(part.path), "images": len(part.rows_N), "digest": part.manifest.digest}
    if part.source is None:
        return record
    manifest = part.manifest
    return record | {
        "source": part.source,
        "split": part.split,
        "account": dict(manifest.account),
        "skipped": manifest.skipped_count,
        "notices": [warned._asdict() for warned in manifest.warnings],
    }
