"""Fine-tune a run's backbone with labels in plain PyTorch: python finetune.py runs/NAME data/train.beton [EPOCHS]

`fastssl export RUN --to timm --out backbone.safetensors` writes the same weights for timm.create_model instead.
"""

import sys

import torch
from torch import nn

import fastssl

run, path, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
pretrained = fastssl.load(run)
side_px = pretrained.recipe.augment.side_px
view = fastssl.View(side_px=side_px, crop="random_resized", area_min=0.3, hflip_p=0.5)
train = fastssl.views(path, batch_size=64, views=[view, view], device=pretrained.device)  # two views: twice the data

backbone = pretrained.backbone.train()
for parameter in backbone.parameters():
    parameter.requires_grad_(True)
head = nn.LazyLinear(len(train.manifest.classes)).to(train.device)
with torch.no_grad():
    head(backbone(next(iter(train))[0].flatten(0, 1)))  # gives the head its shape
train.set_epoch(1)
optimizer = torch.optim.AdamW(
    [{"params": backbone.parameters(), "lr": 1e-4}, {"params": head.parameters(), "lr": 1e-3}], weight_decay=1e-2
)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=-1)

for epoch in range(epochs):
    right = seen = 0
    for views, labels, index in train:
        logits, targets = head(backbone(views.flatten(0, 1))), labels.repeat(len(views))
        loss = criterion(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right, seen = right + int((logits.argmax(1) == targets).sum()), seen + len(targets)
    print(f"epoch {epoch}: loss {loss.item():.2f}, training accuracy {100 * right / seen:.1f} %")
