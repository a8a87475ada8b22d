"""VICReg as a LightningModule: python lightning_loop.py data/train.beton [EPOCHS]"""

import sys

import lightning
import torch
import torchvision
from torch import nn

import fastssl

path, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10


class VicReg(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18(num_classes=128)
        self.backbone.fc = nn.Linear(512, 128)

    def training_step(self, batch, batch_index):
        views, labels, index = batch
        z = self.backbone(views.flatten(0, 1)).view(*views.shape[:2], -1)
        terms = fastssl.losses.vicreg(z)
        self.log_dict(terms, batch_size=views.shape[1])
        return terms["loss"]

    def train_dataloader(self):  # called on each rank once torch.distributed is initialized
        return fastssl.views(path, batch_size=64, views=4, side_px=32, device=self.device)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


# The views are made on the device already: Lightning only hands them on.
trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(VicReg())
print(f"loss {trainer.callback_metrics['loss']:.2f}")
