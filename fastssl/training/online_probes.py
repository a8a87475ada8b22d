"""What the frozen features of a network know: features extracted once, then every probe of the table.

Under torchrun each rank embeds its contiguous share of the images and all ranks get all rows, in the same order as
one process would have them, so every figure is one process's.

N images, F features, V views.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.build import ranks
from fastssl.data.batch import Batch
from fastssl.models import pretrainer
from fastssl.probes import evaluate, table
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe

Embed = Callable[[Batch], Tensor]
PIXELS_PX = 32  # of the raw pixels' baseline
SPECTRUM_IMAGES, INVARIANCE_IMAGES, INVARIANCE_VIEWS = 2000, 512, 2


class Part:
    """Some images of a file, in the file's order; this rank's share of them behind a loader."""

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        indices: Tensor,
        *,
        device: torch.device,
        share: build.data.Loader | None = None,
    ) -> None:
        # With fewer images than ranks some would have nothing to embed: then every rank embeds all.
        self.shared = ranks.world() > 1 and len(indices) >= ranks.world()
        rank, world = (ranks.rank(), ranks.world()) if self.shared else (0, 1)
        self.loader = build.data.ordered_loader(
            recipe, path, indices, device=device, share=share, rank=rank, world=world
        )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This rank's batches."""
        return self.loader.epoch(epoch)

    def features(
        self, embed: Embed, *, progress: evaluate.Progress | None = None, alive: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (N, F) float32 and labels (N,) of all its images, the last short batch included, on every rank.

        Args:
            embed: a batch's features.
            progress: called with ("features", batches done, batches in all), as often on one rank as on another.
            alive: called after every batch.
        """
        pairs = []
        with torch.inference_mode():
            for done, batch in enumerate(self.epoch(0), start=1):
                pairs.append((embed(batch).float(), batch.labels_B))
                if alive:
                    alive()
                if progress and not self.shared:  # shares may differ by a batch
                    progress("features", done, len(self.loader))
        columns = (torch.cat(column).clone() for column in zip(*pairs, strict=True))
        features_NF, labels_N = (ranks.gather_rows(rows) if self.shared else rows for rows in columns)
        return features_NF, labels_N


class Prober:
    """Loaders and settings of a recipe's probes, made once and used at every evaluation.

    Args:
        recipe: decides the probes.
        probe_path: file of the labeled images that probes learn from.
        sets: which of its images they are, and which are held out.
        clean: the view that changes nothing but the size.
        device: device of the network.
        share: an open loader of the probes' file, whose memory they then use.
        pretraining: an open loader of the pretraining file, likewise.
    """

    def __init__(
        self,
        recipe: Recipe,
        probe_path: Path,
        sets: build.data.Sets,
        *,
        clean: Augment,
        device: torch.device,
        share: build.data.Loader | None = None,
        pretraining: build.data.Loader | None = None,
    ) -> None:
        self.recipe, self.clean, self.device = recipe, clean, device
        self.autocast = build.hardware.autocast(recipe)
        self.augmented = replace(clean, views=build.views.table(recipe)[:INVARIANCE_VIEWS])
        learn = build.data.some_of(sets.probe, recipe.evaluate.max_train)
        val, self.left_out = build.data.of_known_classes(build.data.labels_of(probe_path), learn, sets.val)
        chosen = {
            "learn": learn,
            "val": val,
            "all": torch.cat([sets.probe, sets.val]).sort().values,
        }
        parts: dict[str, Part | None] = {}
        for name, indices in chosen.items():
            parts[name] = Part(recipe, probe_path, indices, device=device, share=share) if len(indices) else None
            share = share or next((part.loader for part in parts.values() if part), None)  # one copy of the file
        self.learn, self.val, self.all_labeled = parts.values()
        one_file = recipe.data.probe_path is None
        self.pretraining, self.varied = self.pretraining_parts(sets.train, share if one_file else pretraining)

    @property
    def not_measured(self) -> list[str]:
        """What evaluations leave out, and a test set that is none, a sentence each."""
        said, data = [self.left_out] if self.left_out else [], self.recipe.data
        if self.pretraining is None:
            said += ["No image of a stream can be picked: RankMe and other figures without labels are not measured."]
        if data.test_path is not None and data.test_path.exists():
            unlabeled = int((build.data.labels_of(data.test_path) < 0).sum())
            if unlabeled and self.all_labeled is not None:
                said += [f"{unlabeled} images of {data.test_path} have no label, and are left out."]
            probe_path = data.probe_path or data.path
            if build.data.manifest_of(data.test_path).digest == build.data.manifest_of(probe_path).digest:
                said += [f"{data.test_path} has the images of {probe_path}: its accuracies are of images learned from."]
        return said

    def pretraining_parts(self, train: Tensor, share: build.data.Loader | None) -> tuple[Part | None, Part | None]:
        """Pretraining images for the figures without labels; a stream, from which none can be picked, has none."""
        path = self.recipe.data.path
        if path.is_dir():
            return None, None
        images = build.data.some_of(train, SPECTRUM_IMAGES)
        clean = Part(self.recipe, path, images, device=self.device, share=share)
        few = build.data.some_of(images, INVARIANCE_IMAGES)
        return clean, Part(self.recipe, path, few, device=self.device, share=share or clean.loader)

    def while_training(self, backbone: nn.Module, *, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Accuracies on held-out images, where there are labels, and what features of pretraining images look like.

        Args:
            backbone: whose features.
            alive: called after every batch and probe, since all of it may take longer than a step may.
        """
        embed, metrics = self.embed_with(backbone), dict[str, float]()
        if self.learn is not None and self.val is not None:
            epochs = self.recipe.evaluate.linear_epochs_while_training
            learned, judged = (part.features(embed, alive=alive) for part in (self.learn, self.val))
            labeled = self.labeled(learned, judged, linear_epochs=epochs, progress=lambda *_: alive())
            metrics = table.accuracies(labeled) | {"val_images": float(len(labeled.test_MF))}
            alive()
        if self.pretraining is not None and self.varied is not None:
            features_NF, _ = self.pretraining.features(embed, alive=alive)
            views_NVF, _ = self.varied.features(lambda batch: self.embed_views(backbone, batch), alive=alive)
            metrics |= table.figures(features_NF, views_VNF=views_NVF.movedim(1, 0), while_training=True)
        return metrics

    def at_the_end(
        self, backbone: nn.Module, test_path: Path, *, progress: evaluate.Progress | None = None
    ) -> dict[str, float]:
        """The accuracies on the test set, learned from every labeled image; empty without labels.

        Args:
            backbone: whose features.
            test_path: the file of the test set.
            progress: called with (what, done, in all) while features are extracted and the linear probe is trained.
        """
        if self.all_labeled is None:
            return {}
        embed, epochs = self.embed_with(backbone), self.recipe.evaluate.linear_epochs
        parts = (self.all_labeled, self.test_part(test_path))
        learned, tested = (part.features(embed, progress=progress) for part in parts)
        labeled = self.labeled(learned, tested, linear_epochs=epochs, progress=progress)
        metrics = table.accuracies(labeled) | {"images": float(len(labeled.test_MF))}
        return {f"{table.TEST}{name}": value for name, value in metrics.items()}

    def baselines(
        self, in_channels: int, test_path: Path, *, progress: evaluate.Progress | None = None
    ) -> dict[str, float]:
        """kNN on the test set from raw pixels and from the same network untrained, where the recipe can name it."""
        assert self.all_labeled is not None
        pixels, network = table.BASELINES
        embeds: dict[str, Embed] = {pixels: self.pixels}
        if self.recipe.model.backbone != build.model.CUSTOM:
            untrained_recipe = load(self.recipe, ["model.weights=null", "model.freeze=0"])
            untrained = build.model.network(untrained_recipe, in_channels=in_channels, device=self.device).backbone
            embeds[network] = self.embed_with(untrained)
        parts, metrics = (self.all_labeled, self.test_part(test_path)), dict[str, float]()
        for prefix, embed in embeds.items():
            learned, tested = (part.features(embed, progress=progress) for part in parts)
            labeled = self.labeled(learned, tested)
            metrics |= {f"{prefix}{key}": value for key, value in table.accuracies(labeled, names=["knn"]).items()}
        return metrics

    def labeled(
        self,
        learned: tuple[Tensor, Tensor],
        judged: tuple[Tensor, Tensor],
        *,
        linear_epochs: int = 0,
        progress: evaluate.Progress | None = None,
    ) -> evaluate.Labeled:
        """Features and labels of both parts, with the recipe's settings."""
        spec = self.recipe.evaluate
        return evaluate.Labeled(
            *learned,
            *judged,
            knn_k=spec.knn_k,
            linear_epochs=linear_epochs,
            whitened_knn=spec.whitened_knn,
            progress=progress,
        )

    def test_part(self, test_path: Path) -> Part:
        return Part(self.recipe, test_path, build.data.labeled_rows(test_path), device=self.device)

    def pixels(self, batch: Batch) -> Tensor:
        """Of the clean view, at most PIXELS_PX on a side: all of a large image's would not fit for a whole set."""
        view_BCHW = views_of(self.clean, batch)[0][0]
        if view_BCHW.shape[-1] > PIXELS_PX:
            view_BCHW = nnf.adaptive_avg_pool2d(view_BCHW, PIXELS_PX)
        return view_BCHW.flatten(1)

    def embed_with(self, backbone: nn.Module) -> Embed:
        """Batches to pooled features, with the network's batch statistics fixed."""
        return lambda batch: pretrainer.embed(backbone, views_of(self.clean, batch)[0][0], autocast=self.autocast)

    def embed_views(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """Features (B, V, F) of augmented views."""
        views = [view_BCHW for group in views_of(self.augmented, batch) for view_BCHW in group]
        return torch.stack([pretrainer.embed(backbone, view, autocast=self.autocast) for view in views], dim=1)


def views_of(augment: Augment, batch: Batch, epoch: int = 0) -> tuple[Tensor, ...]:
    """The views of a loader's batch, one (V, B, C, H, W) for each side length."""
    return augment(batch, epoch)
