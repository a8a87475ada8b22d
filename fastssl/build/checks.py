"""What of a recipe its images or the ranks cannot do: batches that do not divide, choices from a stream."""

from fastssl.build import ranks
from fastssl.errors import UserError, option
from fastssl.recipe.schema import Recipe


def check_batch(recipe: Recipe, images: int) -> None:
    """Refuses fewer images than a batch, and a last batch that cannot be shared out.

    Raises:
        UserError: naming the field.
    """
    if images < recipe.data.batch_size:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} is larger than the {max(0, images)} images to train on.",
            f"Set data.batch_size to {max(2, images)} or lower, or add images.",
        )
    rest = images % recipe.data.batch_size
    if not recipe.data.drop_last and rest and not divides(recipe, rest):
        raise UserError(
            f"data.drop_last is false, but the last batch of {rest} of {images} images does not divide into "
            f"{parts_of_step(recipe)} parts (ranks times optim.accumulate_steps) of {least_images(recipe)} or more.",
            "Set data.drop_last to true, or another data.batch_size.",
        )


def check_parts(recipe: Recipe) -> None:
    """Refuses a batch that does not divide over the ranks, once these have joined.

    Raises:
        UserError: naming the field.
    """
    batch_size, parts, least = recipe.data.batch_size, parts_of_step(recipe), least_images(recipe)
    if divides(recipe, batch_size):
        return
    steps, groups = recipe.optim.accumulate_steps, recipe.model.batch_norm_groups
    among = f"{ranks.world()} ranks" + (f" times optim.accumulate_steps {steps}" if steps > 1 else "")
    of_groups = f" into parts of at least {least} for model.batch_norm_groups {groups}" if groups > 1 else ""
    near = max(least, batch_size // parts) * parts
    raise UserError(
        f"data.batch_size {batch_size} does not divide over {among}{of_groups}.",
        f"Set data.batch_size to {near} or {near + parts}.",
    )


def divides(recipe: Recipe, images: int) -> bool:
    """Whether each rank gets equally many images of a batch in each of its parts, and enough of them.

    Parts of unequal size would not weigh alike, and an empty group of images has no batch statistics.
    """
    share, rest = divmod(images, parts_of_step(recipe))
    return not rest and share >= least_images(recipe)


def parts_of_step(recipe: Recipe) -> int:
    return ranks.world() * recipe.optim.accumulate_steps


def least_images(recipe: Recipe) -> int:
    """Images of a part on one rank: one of each group with statistics of its own, and two of it over all ranks."""
    groups = recipe.model.batch_norm_groups
    return max(groups, -(-2 * groups // ranks.world()))


def check_stream(recipe: Recipe) -> None:
    """Refuses what a stream of shards cannot do: choose images, and know their labels beforehand.

    Raises:
        UserError: naming the field.
    """
    data = recipe.data
    if data.fraction != 1:
        raise UserError(
            f"data.fraction is {data.fraction}, and {data.path} is a folder of shards, which is streamed whole.",
            f"Choose the images with {option('fraction')} of convert, or set data.fraction to 1.",
        )
    if data.probe_path is None and (data.val_count or data.test_path):
        raise UserError(
            f"{data.path} is a folder of shards, whose labels are not known beforehand, and there is no probe set.",
            "Set data.probe_path to a .beton of labeled images, or data.val_count to 0 and data.test_path to none.",
        )
