"""Progressive resolution: views are smaller at first and grow in a few steps to the sides of the view table.

A pure function of the epoch, so that a resume changes nothing, with few values, so that a compiler sees few shapes.
Source: FFCV's ImageNet training (arXiv 2306.12517), after Howard's progressive resizing; here in equal steps from
`from_px`, where theirs are rounded to multiples.
"""

from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Augment, ViewSpec

MAX_SIDES = 8  # torch.compile keeps so many shapes of a function and then gives up on it
# Crops that show the same picture smaller; the others would show less of it.
SCALED = ("random_resized", "resize", "center")


def full_side_px(augment: Augment) -> int:
    """Side of the largest view of the table."""
    return max(row.side_px for row in view_table(augment))


def largest_side_px(augment: Augment, epoch: int, epochs: int) -> int:
    """What no view of an epoch is larger than: from_px plus whole steps; the full side from `until * epochs` on, and in
    the last epoch.

    Args:
        epoch: from 0.
        epochs: of the whole run.
    """
    spec, full_px = augment.progressive, full_side_px(augment)
    if spec is None or epochs == 1:
        return full_px
    share = epoch / min(spec.until * epochs, epochs - 1) + 1e-9  # 3 / (0.1 * 30) is below 1
    steps = int(share * (full_px - spec.from_px) / spec.step_px)
    return full_px if share >= 1 else spec.from_px + steps * spec.step_px


def views_of_epoch(augment: Augment, epoch: int, epochs: int) -> tuple[ViewSpec, ...]:
    """The view table of an epoch. Multi-crop's small views keep their side as long as it is not above the largest."""
    largest_px = largest_side_px(augment, epoch, epochs)
    return tuple(at_most(row, largest_px) for row in view_table(augment))


def at_most(row: ViewSpec, side_px: int) -> ViewSpec:
    """The row, or the same picture smaller: a blur is as wide in relation to it."""
    if row.side_px <= side_px:
        return row
    share = side_px / row.side_px
    widths = {name: getattr(row, name) * share for name in ("blur_sigma_min_px", "blur_sigma_max_px")}
    return row.model_copy(update={"side_px": side_px} | widths)


def sides_px(augment: Augment, epochs: int) -> list[int]:
    """Every largest side of a run, in their order."""
    if augment.progressive is None:
        return [full_side_px(augment)]
    return sorted({largest_side_px(augment, epoch, epochs) for epoch in range(epochs)})


def disagreements(augment: Augment, epochs: int) -> list[str]:
    """What keeps the schedule from working, in words."""
    spec = augment.progressive
    if spec is None:
        return []
    if epochs == 1:
        return ["augment.progressive has no effect on a single epoch: leave it out, or set train.epochs to 2 or more"]
    rows, full_px, problems = view_table(augment), full_side_px(augment), list[str]()
    if spec.from_px >= full_px:
        return [f"augment.progressive.from_px {spec.from_px} is not below the views' side of {full_px}"]
    still = sorted({row.crop for row in rows if row.side_px > spec.from_px and row.crop not in SCALED})
    if still:
        problems.append(
            f"augment.progressive makes views smaller, and crop {' and '.join(still)} would cut them smaller instead: "
            f"use {', '.join(SCALED)}"
        )
    sides = sides_px(augment, epochs)
    if len(sides) > MAX_SIDES:
        step_px = -(-(full_px - spec.from_px) // (MAX_SIDES - 1))
        problems.append(
            f"augment.progressive gives {len(sides)} sides, more than {MAX_SIDES}: set step_px to {step_px} or more"
        )
    return problems
