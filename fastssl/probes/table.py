"""The table of probes: the one home of every metric's key in records, its label, and which way is better.

A new metric is a function and one row here; the console, the report, `runs`, `sweep` and `export` read the table.
N training images, M test images, F features.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fastssl.probes import evaluate, spectrum, whitening
from fastssl.probes.evaluate import Labeled
from fastssl.probes.spectrum import Features

TEST = "test_"  # before a key: measured on the test set
BASELINES = {"raw_pixel_": "raw pixels", "untrained_": "the untrained network"}  # before a key: of other features


@dataclass(frozen=True)
class Probe:
    """One metric.

    Attributes:
        key: in records, "{k}" standing for a number of neighbors; accuracies end in _pct.
        label: for people.
        higher_is_better: None where neither way is.
        function: of `Labeled`, to a mapping of keys to numbers (an accuracy and what was chosen for it), or of
            `Features`, to one number, None where it is not defined.
        digits: after the decimal point, for people.
        meaning: one sentence for the report, where the label does not say it.
        while_training: measured at every evaluation of a run, not by `fastssl eval` alone.
    """

    key: str
    label: str
    higher_is_better: bool | None
    function: Callable[..., Any]
    digits: int = 1
    meaning: str = ""
    while_training: bool = True

    @property
    def name(self) -> str:
        """As `fastssl eval --probe` takes it: knn, ridge, linear."""
        return self.key.removesuffix("_pct").removesuffix("{k}")

    def matches(self, key: str) -> bool:
        return re.fullmatch(self.key.replace("{k}", r"\d+"), key) is not None


# Of labeled images, in the order in which they are shown; the first one is what runs are compared by.
ACCURACIES = (
    Probe("knn{k}_pct", "kNN", True, evaluate.knn_accuracies),
    Probe("whitened_knn{k}_pct", "whitened kNN", True, whitening.knn_accuracies),
    Probe("ridge_pct", "ridge", True, evaluate.ridge_accuracy),
    Probe("linear_pct", "linear probe", True, evaluate.linear_accuracy),
)
# Of images without labels. RankMe comes first: it is what unlabeled runs are compared by.
FIGURES = (
    Probe(
        "rankme",
        "RankMe (centered)",
        True,
        spectrum.rank_of,
        meaning="About how many directions the features vary in; 1 is a collapse. Centered, unlike in its paper.",
    ),
    Probe(
        "rankme_uncentered",
        "RankMe (uncentered)",
        None,
        spectrum.uncentered_rank_of,
        meaning="As in its paper: the mean of the features counts as a direction, and is often the strongest.",
        while_training=False,
    ),
    Probe(
        "participation_ratio",
        "participation ratio",
        True,
        spectrum.participation_of,
        meaning="How many directions share the variance, the strong ones counting most.",
    ),
    Probe(
        "orthogonality_residual",
        "orthogonality residual",
        False,
        spectrum.mean_correlation,
        digits=3,
        meaning="Mean absolute correlation of two dimensions, 0 to 1.",
    ),
    Probe(
        "invariance_residual",
        "invariance residual",
        False,
        spectrum.invariance_of,
        digits=3,
        meaning="Variance between two views of an image over that of all, 0 to 1.",
    ),
    Probe("alpha", "alpha", None, partial(spectrum.alpha_fit, part=0), digits=2),
    Probe("alpha_r2", "R² of alpha", None, partial(spectrum.alpha_fit, part=1), digits=2),
    Probe("dead_dims", "dead dimensions", False, spectrum.dead_dims, digits=0, meaning="Dimensions that do not vary."),
    Probe("dims", "dimensions", None, spectrum.dims, digits=0),
    Probe("spectrum_images", "images of the spectrum", None, spectrum.count, digits=0),
)


def accuracies(labeled: Labeled, *, names: Sequence[str] | None = None) -> dict[str, float]:
    """Every accuracy of frozen features, top-1 in percent, with what was chosen for it.

    Args:
        labeled: features, labels and the probes' settings.
        names: of the probes to run; None is all of the table.

    Raises:
        UserError: when features are not finite, labels are missing, or a class is unseen in train.
    """
    metrics: dict[str, float] = {}
    for probe in ACCURACIES:
        if names is None or probe.name in names:
            metrics |= probe.function(labeled)
    return metrics


def figures(features_NF: Tensor, *, views_VNF: Tensor | None = None, while_training: bool = False) -> dict[str, float]:
    """Every figure that needs no label; those that are not defined for these features are left out.

    Args:
        features_NF: any float dtype.
        views_VNF: features of V >= 2 views of the same images, for the invariance residual.
        while_training: leave out what `fastssl eval` alone reports.
    """
    features = Features(features_NF, views_VNF)
    rows = [probe for probe in FIGURES if probe.while_training or not while_training]
    values = {probe.key: probe.function(features) for probe in rows}
    return {key: value for key, value in values.items() if value is not None}


def probe_of(key: str) -> Probe | None:
    """The row of a record's key, with or without "test_" before it; None for what is no metric."""
    bare = key.removeprefix(TEST)
    return next((probe for probe in (*ACCURACIES, *FIGURES) if probe.matches(bare)), None)


def label_of(key: str, record: Mapping[str, Any] | None = None) -> str:
    """What people read: knn20_pct is "kNN (k = 20)", or the k that was used where the record says another."""
    probe = probe_of(key)
    if probe is None:
        return key
    asked = re.fullmatch(probe.key.replace("{k}", r"(\d+)"), key.removeprefix(TEST))
    if asked is None or not asked.groups():
        return probe.label
    used = (record or {}).get(key.removesuffix("_pct") + "_used", asked[1])
    return f"{probe.label} (k = {int(used)})"


def accuracies_in(record: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """The accuracies of a record by their labels, in the table's order.

    Args:
        record: an evaluation, or a run's summary.
        prefix: of the keys that are meant: "", "test_", or a baseline's.
    """
    bare = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
    return {label_of(key, bare): bare[key] for probe in ACCURACIES for key in bare if probe.matches(key)}


def figures_text(record: Mapping[str, float], *, short: bool = False) -> str:
    """A record's figures in one line, with the number of images that they were measured on; empty without any.

    Args:
        record: an evaluation, or `figures`.
        short: leave out those of which neither way is better, and dead dimensions where there are none.
    """
    rows = [probe for probe in FIGURES if probe.key in record and probe.key not in ("dims", "spectrum_images")]
    shown = [
        probe
        for probe in rows
        if not short or (probe.higher_is_better is not None and (probe.key != "dead_dims" or record[probe.key]))
    ]
    parts = [f"{probe.label} {record[probe.key]:.{probe.digits}f}" for probe in shown]
    place = [f"{record['dims']:.0f} dimensions"] if "dims" in record else []
    place += [f"n = {record['spectrum_images']:,.0f}"] if "spectrum_images" in record else []
    return f"{', '.join(parts)} ({', '.join(place)})" if parts else ""


def accuracy_text(pct: float, count: float | None) -> str:
    """An accuracy with half its 95 % interval over `count` images: 81.2 ± 1.5 %."""
    if not count or count < 1 or not 0 <= pct <= 100:  # nothing that was measured
        return f"{pct:.1f} %"
    low, high = evaluate.interval_pct(pct, int(count))
    return f"{pct:.1f} ± {(high - low) / 2:.1f} %"


def remarks(metrics: Mapping[str, float], *, done: float = 1.0) -> dict[str, str]:
    """What a person should know of an evaluation, by kind: one sentence or two each.

    Args:
        metrics: of one evaluation; a stream's has accuracies alone.
        done: share of the training that is done, (0, 1].
    """
    capped = [(key, value) for key, value in metrics.items() if key.endswith("_used") and key.startswith("knn")]
    notes = {
        key: f"kNN uses k = {int(value)} in place of {re.sub(r'[^0-9]', '', key)}: "
        f"there are about {int(value)} labeled images of a class."
        for key, value in capped
    }
    chosen = {"ridge": ("Ridge's strength", "ridge_strength"), "linear": ("The linear probe's rate", "linear_lr")}
    notes |= {
        f"{probe}_unchosen": f"{what} of {metrics[key]:g} was not chosen: no class has a second labeled image."
        for probe, (what, key) in chosen.items()
        if f"{probe}_unchosen" in metrics
    }
    if per_feature := metrics.get("whitened_images_per_feature"):
        notes["whitened_few"] = (
            f"Whitened kNN learns from {per_feature:.2g} times as many images as features, too few to tell how "
            f"these vary together, and may be below kNN: it takes {whitening.ENOUGH} times as many."
        )
    return notes | (spectrum.collapse_warnings(metrics, done=done) if "dims" in metrics else {})


def judged_by(record: Mapping[str, Any]) -> str | None:
    """The key that runs with such evaluations are compared by: the first accuracy, else the first figure."""
    rows = [probe for probe in (*ACCURACIES, *FIGURES) if probe.higher_is_better is not None]
    return next((key for probe in rows for key in record if probe.matches(key)), None)


def value_text(key: str, value: float | None) -> str:
    """A metric as people read it: 81.2 %, or 6.5."""
    if value is None:
        return ""
    probe = probe_of(key)
    return f"{value:.1f} %" if key.endswith("_pct") else f"{value:.{probe.digits if probe else 4}f}"
