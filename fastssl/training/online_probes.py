"""What the frozen features of a network know: features extracted once, then every probe the recipe asks for.

Under torchrun each rank embeds its contiguous share of the images and all ranks get all rows, in the same order as
one process would have them, so every figure is one process's.

N images, F features, V views.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.build import ranks
from fastssl.data.batch import Batch
from fastssl.models import pretrainer
from fastssl.probes import evaluate, spectrum
from fastssl.recipe.schema import Recipe

Embed = Callable[[Batch], Tensor]
INVARIANCE_IMAGES, INVARIANCE_VIEWS = 512, 2


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

    def features(self, embed: Embed) -> tuple[Tensor, Tensor]:
        """Features (N, F) float32 and labels (N,) of all its images, the last short batch included, on every rank."""
        with torch.inference_mode():
            pairs = [(embed(batch).float(), batch.labels_B) for batch in self.epoch(0)]
        found = (torch.cat(column).clone() for column in zip(*pairs, strict=True))
        features_NF, labels_N = (ranks.gather_rows(rows) if self.shared else rows for rows in found)
        return features_NF, labels_N


class Prober:
    """Loaders and settings of a recipe's probes, made once and used at every evaluation.

    Args:
        recipe: decides the probes.
        probe_path: file of the labeled images that probes learn from.
        sets: which of its images they are, and which are held out.
        clean: the view that changes nothing but the size.
        device: device of the network.
        share: an open loader of the same file, whose memory the probes then use.
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
    ) -> None:
        self.recipe, self.clean, self.device = recipe, clean, device
        self.autocast = build.hardware.autocast(recipe)
        self.varied = replace(clean, views=build.views.table(recipe)[:INVARIANCE_VIEWS])
        chosen = {
            "learn": build.data.some_of(sets.probe, recipe.evaluate.max_train),
            "val": sets.val,
            "varied": build.data.some_of(sets.val, INVARIANCE_IMAGES),
            "all": torch.cat([sets.probe, sets.val]).sort().values,
        }
        parts: dict[str, Part | None] = {}
        for name, indices in chosen.items():
            parts[name] = Part(recipe, probe_path, indices, device=device, share=share) if len(indices) else None
            share = share or next((part.loader for part in parts.values() if part), None)  # one copy of the file
        self.learn, self.val, self.varied_val, self.all_labeled = parts.values()

    def while_training(self, backbone: nn.Module) -> dict[str, float]:
        """kNN and ridge on the held-out images, and what their features look like; empty without labels."""
        if self.learn is None or self.val is None or self.varied_val is None:
            return {}
        embed = self.embed_with(backbone)
        train_NF, train_labels_N = self.learn.features(embed)
        val_MF, val_labels_M = self.val.features(embed)
        found = self.quick(train_NF, train_labels_N, val_MF, val_labels_M)
        epochs = self.recipe.evaluate.linear_epochs_while_training
        if epochs:
            found |= evaluate.linear_probe(train_NF, train_labels_N, val_MF, val_labels_M, epochs=epochs)
        views_NVF, _ = self.varied_val.features(lambda batch: self.embed_views(backbone, batch))
        return found | spectrum.figures(val_MF, views_VNF=views_NVF.movedim(1, 0))

    def at_the_end(self, backbone: nn.Module, test_path: Path) -> dict[str, float]:
        """kNN, ridge and the linear probe on the test set, learned from every labeled image."""
        if self.all_labeled is None:
            return {}
        embed = self.embed_with(backbone)
        train_NF, train_labels_N = self.all_labeled.features(embed)
        test_MF, test_labels_M = self.test_part(test_path).features(embed)
        found = self.quick(train_NF, train_labels_N, test_MF, test_labels_M)
        if self.recipe.evaluate.linear_epochs:
            found |= evaluate.linear_probe(
                train_NF, train_labels_N, test_MF, test_labels_M, epochs=self.recipe.evaluate.linear_epochs
            )
        return {f"test_{name}": value for name, value in found.items()}

    def baselines(self, in_channels: int, test_path: Path) -> dict[str, float]:
        """kNN on the test set from raw pixels and from the same network untrained, where the recipe can name it."""
        assert self.all_labeled is not None
        embeds: dict[str, Embed] = {"raw_pixel": self.pixels}
        if self.recipe.model.backbone != build.model.CUSTOM:
            untrained = build.model.network(self.recipe, in_channels=in_channels, device=self.device).backbone
            embeds["untrained"] = self.embed_with(untrained)
        test, found = self.test_part(test_path), dict[str, float]()
        for name, embed in embeds.items():
            learned, tested = self.all_labeled.features(embed), test.features(embed)
            accuracies = evaluate.knn(*learned, *tested, ks=self.recipe.evaluate.knn_k)
            found |= {f"{name}_{key}": value for key, value in accuracies.items()}
        return found

    def test_part(self, test_path: Path) -> Part:
        return Part(self.recipe, test_path, torch.arange(len(build.data.labels_of(test_path))), device=self.device)

    def quick(self, *features_and_labels: Tensor) -> dict[str, float]:
        found = evaluate.knn(*features_and_labels, ks=self.recipe.evaluate.knn_k)
        return found | evaluate.ridge(*features_and_labels)

    def pixels(self, batch: Batch) -> Tensor:
        return views_of(self.clean, batch)[0][0].flatten(1)

    def embed_with(self, backbone: nn.Module) -> Embed:
        """Batches to pooled features, with the network's batch statistics fixed."""
        return lambda batch: pretrainer.embed(backbone, views_of(self.clean, batch)[0][0], autocast=self.autocast)

    def embed_views(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """Features (B, V, F) of augmented views."""
        views = [view_BCHW for group in views_of(self.varied, batch) for view_BCHW in group]
        return torch.stack([pretrainer.embed(backbone, view, autocast=self.autocast) for view in views], dim=1)


def views_of(augment: Augment, batch: Batch, epoch: int = 0) -> tuple[Tensor, ...]:
    """The views of a loader's batch, one (V, B, C, H, W) for each side length."""
    return augment(batch, epoch)
