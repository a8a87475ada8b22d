"""What the frozen features of a network know: features extracted once, then every probe the recipe asks for."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl import build, evaluate, models, spectrum
from fastssl.augment.engine import Augment
from fastssl.data.batch import Batch
from fastssl.recipe import Recipe

Embed = Callable[[Batch], Tensor]


class Prober:
    """Loaders and settings of a recipe's probes, made once and used at every evaluation.

    Args:
        recipe: decides the probes.
        probe_path: file of the labelled images that probes learn from.
        sets: which of its images they are, and which are held out.
        clean: the view that changes nothing but the size.
        where: device of the network.
        share: an open loader of the same file, whose memory the probes then use.
    """

    def __init__(
        self,
        recipe: Recipe,
        probe_path: Path,
        sets: build.Sets,
        *,
        clean: Augment,
        where: torch.device,
        share: build.Loader | None = None,
    ) -> None:
        self.recipe, self.clean, self.where = recipe, clean, where
        self.autocast = build.autocast(recipe)
        learn = build.some_of(sets.probe, recipe.evaluate.max_train)
        chosen = (learn, sets.val, torch.cat([sets.probe, sets.val]).sort().values)
        self.learn, self.val, self.all_labelled = (
            build.ordered_loader(recipe, probe_path, indices, where=where, share=share) if len(indices) else None
            for indices in chosen
        )

    def while_training(self, backbone: nn.Module) -> dict[str, float]:
        """kNN and ridge on the held-out images, and the spectrum of their features; empty without labels."""
        if self.learn is None or self.val is None:
            return {}
        embed = self.embed_with(backbone)
        train_NF, train_labels_N = self.features(embed, self.learn)
        val_MF, val_labels_M = self.features(embed, self.val)
        found = self.quick(train_NF, train_labels_N, val_MF, val_labels_M)
        return found | spectrum.figures(val_MF)

    def at_the_end(self, backbone: nn.Module, test_path: Path) -> dict[str, float]:
        """kNN, ridge and the linear probe on the test set, learned from every labelled image."""
        if self.all_labelled is None:
            return {}
        embed = self.embed_with(backbone)
        train_NF, train_labels_N = self.features(embed, self.all_labelled)
        test_MF, test_labels_M = self.features(embed, self.test_loader(test_path))
        found = self.quick(train_NF, train_labels_N, test_MF, test_labels_M)
        if self.recipe.evaluate.linear_epochs:
            found |= evaluate.linear_probe(
                train_NF, train_labels_N, test_MF, test_labels_M, epochs=self.recipe.evaluate.linear_epochs
            )
        return {f"test_{name}": value for name, value in found.items()}

    def baselines(self, in_channels: int, test_path: Path) -> dict[str, float]:
        """kNN on the test set from raw pixels and from the same network untrained."""
        assert self.all_labelled is not None
        untrained = build.network(self.recipe, in_channels=in_channels, where=self.where).backbone
        test, found = self.test_loader(test_path), dict[str, float]()
        for name, embed in (("raw_pixel", self.pixels), ("untrained", self.embed_with(untrained))):
            learned, tested = self.features(embed, self.all_labelled), self.features(embed, test)
            accuracies = evaluate.knn(*learned, *tested, ks=self.recipe.evaluate.knn_k)
            found |= {f"{name}_{key}": value for key, value in accuracies.items()}
        return found

    def test_loader(self, test_path: Path) -> build.Loader:
        return build.ordered_loader(self.recipe, test_path, None, where=self.where)

    def quick(self, *features_and_labels: Tensor) -> dict[str, float]:
        found = evaluate.knn(*features_and_labels, ks=self.recipe.evaluate.knn_k)
        return found | evaluate.ridge(*features_and_labels)

    def pixels(self, batch: Batch) -> Tensor:
        return self.view(batch).flatten(1)

    def embed_with(self, backbone: nn.Module) -> Embed:
        """Batches to pooled features, with the network's batch statistics fixed."""
        return lambda batch: models.embed(backbone, self.view(batch), autocast=self.autocast)

    def view(self, batch: Batch) -> Tensor:
        (views_VBCHW,) = self.clean(batch.images, batch.index_B, 0, sizes_B2=batch.sizes_B2, offsets_B=batch.offsets_B)
        return views_VBCHW[0]

    def features(self, embed: Embed, loader: build.Loader) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            pairs = [(embed(batch).float(), batch.labels_B) for batch in loader.epoch(0)]
        return torch.cat([f for f, _ in pairs]), torch.cat([y for _, y in pairs])
