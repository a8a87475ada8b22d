"""Features from threads that share the images: the same bits on any number of threads, and modules that keep state."""

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny import one_torch_thread
from torch import Tensor, nn

from fastssl.errors import SlowWarning
from fastssl.models import backbones, pretrainer

MEETING = threading.Barrier(3)


def on_threads(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr("fastssl.models.workers.cores", lambda: SimpleNamespace(count=count))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_bits_do_not_depend_on_threads(autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(150, 3, 16, 16).to(memory_format=torch.channels_last)
    backbone = backbones.backbone("resnet_tiny", stem="patch2", width=0.25, in_channels=3)
    with one_torch_thread():
        features = []
        for count in (1, 3):
            on_threads(monkeypatch, count)
            features.append(pretrainer.embed(backbone, images, autocast=autocast))
    assert torch.equal(*features)
    assert backbone.training


class Stateful(nn.Module):
    """Leaves what it saw on itself and reads it back, as wrappers with hooks do."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.seen = images_BCHW
        MEETING.wait(60)
        return self.seen.flatten(1)


def test_threads_do_not_see_each_others_state(monkeypatch: pytest.MonkeyPatch) -> None:
    on_threads(monkeypatch, 3)
    images = torch.randn(192, 3, 2, 2)
    assert torch.equal(pretrainer.embed(Stateful(), images, autocast=None), images.flatten(1))


class Uncopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1)


def test_a_module_that_cannot_be_copied_is_called_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    on_threads(monkeypatch, 3)
    images = torch.randn(130, 3, 2, 2)
    with pytest.warns(SlowWarning, match=r"Uncopied cannot be copied \(.*\): one thread embeds instead of 3\."):
        assert torch.equal(pretrainer.embed(Uncopied(), images, autocast=None), images.flatten(1))
