"""Barlow Twins in a plain PyTorch loop: python own_loop.py data/train.beton [EPOCHS]"""

import sys

import torch
import torchvision
from torch import nn

import fastssl

path, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10
train = fastssl.views(path, batch_size=64, views=4, side_px=32)

backbone = torchvision.models.resnet18(num_classes=128)
backbone.fc = nn.Identity()
projector = nn.Sequential(nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128))
network = nn.Sequential(backbone, projector).to(train.device, memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

for epoch in range(epochs):
    for views, labels, index in train:  # (V, B, C, H, W), int64 (B,), int64 (B,)
        z = network(views.flatten(0, 1)).view(*views.shape[:2], -1)
        terms = fastssl.losses.barlow_twins(z)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {terms['loss'].item():.2f}, redundancy {terms['redundancy'].item():.2f}")
    torch.save({"network": network.state_dict(), "views": train.state_dict()}, "own_loop.pt")
