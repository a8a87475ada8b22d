"""What is refused before any data is read or converted."""

import torch

from fastssl.build import model, optim
from fastssl.build.checks import check_batch
from fastssl.build.data import images_to_train_on
from fastssl.build.hardware import device
from fastssl.build.views import check_backend
from fastssl.errors import errors_of, raise_all
from fastssl.recipe.schema import Recipe


def check(recipe: Recipe) -> None:
    """What can be refused before any data is read or converted: device, backend, backbone, a set known to be too small.

    Raises:
        UserError: naming the field.
    """
    raise_all(errors_of(lambda: check_backend(recipe, device(recipe)), lambda: model.check_model(recipe)))
    if recipe.model.backbone != model.CUSTOM and not recipe.data.path.exists():
        check_network(recipe)
    if recipe.data.count and not recipe.data.path.exists():
        check_batch(recipe, images_to_train_on(recipe, recipe.data.count))


def check_network(recipe: Recipe) -> None:
    """Builds the network and forgets it; starting weights are for channels that are not known yet.

    Raises:
        UserError: naming the field.
    """
    optim.check_trainable(model.network(model.drawn(recipe), in_channels=3, device=torch.device("cpu")))
