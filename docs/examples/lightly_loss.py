"""lightly's NT-Xent loss (SimCLR) on these views: python lightly_loss.py data/train.beton [EPOCHS]"""

import sys

import torch
import torchvision
from lightly.loss import NTXentLoss
from torch import nn

import fastssl

path, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10
train = fastssl.views(path, batch_size=64, views=2, side_px=32)

network = torchvision.models.resnet18(num_classes=128)
network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
network.to(train.device, memory_format=torch.channels_last)
criterion, optimizer = NTXentLoss(), torch.optim.AdamW(network.parameters(), lr=1e-3)

for epoch in range(epochs):
    for (first, second), labels, index in train:
        loss = criterion(network(first), network(second))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.2f}")
