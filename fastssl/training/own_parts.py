"""Parts that Python hands to `train` in place of the recipe's, checked before they are used.

V views, B images, D embedding dimensions.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastssl import build
from fastssl.errors import OwnWarning, UserError
from fastssl.losses.loss import Terms
from fastssl.losses.statistics import full_precision
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.recipe.view import Row, row_of

OwnLoss = Callable[[Tensor], Tensor | Terms]
# What a line of metrics.jsonl holds besides the loss's terms, see `log_step`, and what a step adds to them.
TAKEN = {
    *("event", "step", "epoch", "lr", "images", "views", "train_s", "images_per_s", "views_per_s", "load_pct"),
    *("views_pct", "side_px", "gradient_norm", "skipped"),
}


def with_own(recipe: Recipe, backbone: nn.Module | None, policy: Sequence[Row] | None) -> Recipe:
    """The recipe of a run that is given a module or a view table from Python.

    Raises:
        UserError: naming the argument that is not what it should be.
    """
    if backbone is None and policy is None:
        return recipe
    tree = recipe.model_dump(mode="json")
    if backbone is not None:
        check_backbone(backbone)
        if not backbone.training:  # as `from_pretrained` and `fastssl.load` give one: dropout off, statistics fixed
            warnings.warn("backbone is in evaluation mode; backbone.train() is called.", OwnWarning, stacklevel=4)
            backbone.train()
        if recipe.model.weights is not None:
            raise UserError(
                f"model.weights is {recipe.model.weights}, and backbone has weights of its own.",
                "Set model.weights to null, and load them into the module before it is passed.",
            )
        tree["model"]["backbone"] = build.model.CUSTOM
    if policy is not None:
        if isinstance(policy, str | Mapping) or not isinstance(policy, Sequence):
            raise UserError(f"policy is a {type(policy).__name__}.", "Pass a list with one fastssl.View(...) per view.")
        rows = [row_of(row) for row in policy]
        sides_px = [side_px for row in rows if isinstance(side_px := row.get("side_px", 32), int)]
        side = {"side_px": max(4, *sides_px)} if sides_px else {}
        tree["augment"] |= {"preset": "none", "all": {}, "rows": rows, "views": max(2, len(rows))} | side
    return load(tree)


def check_backbone(backbone: object) -> None:
    """Refuses what is no module, and weights that float32 images cannot be trained with.

    Raises:
        UserError: naming the argument.
    """
    if not isinstance(backbone, nn.Module):
        kind = f"the class {backbone.__name__}" if isinstance(backbone, type) else f"a {type(backbone).__name__}"
        raise UserError(f"backbone is {kind}, not a module.", "Pass an nn.Module, such as backbone=MyNetwork().")
    for name, p in backbone.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            continue  # has no values until the first image
        if p.is_meta:
            raise UserError(f"backbone.{name} is on the device meta, without values.", "Make it on a real device.")
        if p.is_floating_point() and p.dtype != torch.float32:
            dtype = str(p.dtype).removeprefix("torch.")
            raise UserError(
                f"backbone.{name} is {dtype}.", "Pass backbone.float(); train.precision decides what is computed in."
            )
        if p.is_inference():
            raise UserError(f"backbone.{name} was made under torch.inference_mode.", "Make the backbone outside of it.")


def terms_of(loss: OwnLoss) -> Callable[[Tensor], Terms]:
    """A loss that may give a scalar, as one that gives terms.

    Raises:
        UserError: when it is not callable or draws at random, or, when it is called, for anything but a scalar with a
            gradient.
    """
    if not callable(loss):
        raise UserError(f"loss is a {type(loss).__name__}, not a function.", "Pass a function of embeddings (V, B, D).")
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise UserError(
            "loss is a module with parameters, which would not be trained.",
            "Move them to the end of the backbone, or freeze them with loss.requires_grad_(False).",
        )
    for name, known in build.losses.LOSSES.items():
        if loss is known.function and known.is_seeded:
            raise UserError(f"{name} takes a seed that is another at every step.", f"Set loss.name to {name} instead.")

    def terms(z_VBD: Tensor) -> Terms:
        value = loss(full_precision(z_VBD))
        return check_terms(dict(value) if isinstance(value, Mapping) else {"loss": value})

    return terms


def check_terms(terms: Terms) -> Terms:
    fix = 'Return a scalar tensor that depends on the embeddings, or a mapping of scalars of which "loss" is it.'
    if "loss" not in terms:
        raise UserError(f'loss returned a mapping without "loss"; its keys are {", ".join(map(str, terms))}.', fix)
    for name, value in terms.items():
        if not isinstance(name, str) or name in TAKEN:
            raise UserError(f"loss returned a term called {name!r}, which metrics.jsonl cannot take.", "Rename it.")
        what = "loss" if name == "loss" else f"the term {name}"
        if not isinstance(value, Tensor):
            raise UserError(f"loss returned a {type(value).__name__} for {what}, not a tensor.", fix)
        if value.is_complex():
            raise UserError(f"loss returned a complex number for {what}.", fix)
        if value.numel() != 1:
            raise UserError(f"loss returned shape {tuple(value.shape)} for {what}, not a scalar.", fix)
    if not terms["loss"].requires_grad:
        raise UserError("loss returned a value without a gradient (detached, or not made from the embeddings).", fix)
    return {name: value.reshape(()) for name, value in terms.items()}
