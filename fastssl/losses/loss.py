"""One row of the table of losses: a loss brings its function, its weights' rule, its terms and its label."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from fastssl.errors import UserError

Terms = dict[str, Tensor]
Weight = Literal["auto"] | float  # "auto" is the loss's own rule for D and V
Form = Literal["leave_one_out", "authors"]  # over several views: ours, or that of arXiv 2312.10725's code
FORMS: tuple[str, ...] = get_args(Form)

RISK_FACTOR = 10.0  # weights this many times off the rule's risk collapse


@dataclass(frozen=True)
class Loss:
    """What the rest of the package needs to know of a loss.

    Attributes:
        name: in recipes.
        label: for people.
        function: embeddings (V, B, D), the settings of its section of the recipe and `all_sum`, to its terms; "loss"
            carries the gradient, the others are detached.
        terms: names of the others, in the order in which they are shown.
        weights: (dim, views, settings of its section) to its weights as numbers: "auto" resolved.
        collapse_risk: of the same, one sentence when the weights are far from the rule's, else None.
        is_seeded: the function draws at random and takes a `seed`, which is another at every step.
    """

    name: str
    label: str
    function: Callable[..., Terms]
    terms: tuple[str, ...]
    weights: Callable[..., dict[str, float]]
    collapse_risk: Callable[..., str | None]
    is_seeded: bool = False


def check_form(form: str) -> None:
    """UserError for none of the forms."""
    check_choice("form", form, FORMS)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """UserError naming an argument that is none of its choices."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}.", f"Set it to {' or '.join(choices)}.")


def check_weights(**weights: Weight) -> None:
    """UserError naming a weight that is neither auto nor a number of 0 or more."""
    for name, weight in weights.items():
        if isinstance(weight, str) and weight == "auto":
            continue
        if not hasattr(weight, "__float__") or not 0 <= weight < float("inf"):
            raise UserError(f"{name} is {weight!r}.", "Set it to auto or to a finite number of 0 or more.")
