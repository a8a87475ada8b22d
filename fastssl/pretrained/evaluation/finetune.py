"""Fine-tuning: the whole network and a new linear head, trained on labels with one fixed small recipe.

AdamW, cosine learning rate after a tenth of warm-up, label smoothing 0.1, random crops of at least 35 % of the image
and a flip where the run flipped. Nothing is chosen by looking at the images it is judged on.

N images, B batch, F features, C classes.
"""

import copy
import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastssl import build
from fastssl.augment.policy import View
from fastssl.build import optim
from fastssl.errors import option
from fastssl.pretrained.evaluation.splits import Part
from fastssl.pretrained.load import Pretrained
from fastssl.probes.evaluate import Progress, top1_pct
from fastssl.recipe.schema import ViewSpec
from fastssl.training.guards import lack_explained
from fastssl.training.online_probes import views_of

BATCH_SIZE, WEIGHT_DECAY, LABEL_SMOOTHING, AREA_MIN = 128, 0.05, 0.1, 0.35
MIN_STEPS = 100  # so that a hundredth of the labels still trains


def finetune(
    net: Pretrained,
    train: Part,
    test: Part,
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[float, int]:
    """Top-1 accuracy on `test` in percent after the last epoch, and the epochs; the network given stays as it is.

    Args:
        net: where training starts.
        train, test: labeled images.
        epochs: passes over train, more when they would be fewer than MIN_STEPS steps.
        lr: the highest learning rate.
        seed: of the order of images, and of dropout.
        progress: called with ("fine-tuning", steps done, steps in all).
    """
    fix = f"Leave finetune out of {option('probes', flag='probe')}, or set {option('device', 'cpu')}."
    with build.hardware.seeded(seed, net.device), lack_explained(f"in fine-tuning with batches of {BATCH_SIZE}", fix):
        return finetuned_pct(net, train, test, epochs=epochs, lr=lr, seed=seed, progress=progress)


def finetuned_pct(
    net: Pretrained, train: Part, test: Part, *, epochs: int, lr: float, seed: int, progress: Progress | None
) -> tuple[float, int]:
    """As `finetune`, with dropout drawn from torch's global random numbers as they are."""
    classes_C = torch.unique(train.labels_N).to(net.device)  # sorted; labels may be any numbers
    model = classifier(net, len(classes_C))
    batch_size = min(BATCH_SIZE, len(train.rows_N))
    loader = build.data.open_loader(
        net.recipe,
        train.path,
        device=net.device,
        batch_size=batch_size,
        order=partial(build.data.shuffled_order, seed, len(train.rows_N)),
        indices=train.rows_N,
        drop_last=True,
    )
    epochs = max(epochs, math.ceil(MIN_STEPS / len(loader)))
    groups = optim.parameter_groups([model], weight_decay=WEIGHT_DECAY)
    adam = optim.make_optimizer("adamw", groups, lr=lr, momentum=0.9, betas=(0.9, 0.999), trust=1e-3, device=net.device)
    total, step = epochs * len(loader), 0
    augment = replace(net.clean, views=(training_view(net),))
    model.train()
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            rate = optim.learning_rate_at(
                step, base=lr, warmup_steps=total // 10, total_steps=total, schedule="cosine", final_fraction=0.0
            )
            optim.set_learning_rate(adam, rate)
            scores_BC = forward(model, views_of(augment, batch, epoch)[0][0], net)
            adam.zero_grad(set_to_none=True)
            targets_B = torch.searchsorted(classes_C, batch.labels_B)
            loss = nnf.cross_entropy(scores_BC, targets_B, label_smoothing=LABEL_SMOOTHING)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            step += 1
            if progress:
                progress("fine-tuning", step, total)
    return accuracy_pct(model, net, test, classes_C), epochs


def classifier(net: Pretrained, classes: int) -> nn.Sequential:
    head = nn.Linear(net.features_dim, classes)
    nn.init.zeros_(head.weight)  # the first steps then follow the features, not a random head
    nn.init.zeros_(head.bias)
    return nn.Sequential(copy.deepcopy(net.backbone), head).to(net.device)


def training_view(net: Pretrained) -> View:
    flips = any(row.hflip_p > 0 for row in build.views.table(net.recipe))
    spec = ViewSpec(side_px=net.clean.views[0].side_px, crop="random_resized", area_min=AREA_MIN, hflip_p=0.5 * flips)
    return View(**spec.model_dump())


def forward(model: nn.Module, view_BCHW: Tensor, net: Pretrained) -> Tensor:
    """Scores (B, C) float32; fp16 would need scaled gradients, so it runs in float32."""
    mixed = net.autocast is torch.bfloat16
    with torch.autocast(view_BCHW.device.type, dtype=torch.bfloat16, enabled=mixed):
        scores_BC: Tensor = model(view_BCHW if mixed else view_BCHW.float())
    return scores_BC.float()


@torch.no_grad()
def accuracy_pct(model: nn.Module, net: Pretrained, test: Part, classes_C: Tensor) -> float:
    model.eval()
    loader = build.data.ordered_loader(net.recipe, test.path, test.rows_N, device=net.device)
    guesses = [forward(model, views_of(net.clean, batch)[0][0], net).argmax(1) for batch in loader.epoch(0)]
    return top1_pct(classes_C[torch.cat(guesses)].cpu(), test.labels_N)
