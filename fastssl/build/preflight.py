"""What is refused before any data is read or converted."""

from fastssl.build.checks import check_batch
from fastssl.build.data import images_to_train_on
from fastssl.build.hardware import device
from fastssl.build.model import check_model
from fastssl.build.views import check_backend
from fastssl.recipe.schema import Recipe


def check(recipe: Recipe) -> None:
    """What can be refused before any data is read or converted: device, backend, backbone, a set known to be too small.

    Raises:
        UserError: naming the field.
    """
    check_backend(recipe, device(recipe))
    check_model(recipe)
    if recipe.data.count and not recipe.data.path.exists():
        check_batch(recipe, images_to_train_on(recipe, recipe.data.count))
