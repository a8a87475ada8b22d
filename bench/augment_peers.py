"""The augmentations that `bench/augment.py` sets side by side: each cuts V views of every image it is handed.

A peer is a generator of (number of views, views): float32, normalized, from uint8 images that lie decoded in memory,
with the settings its documentation recommends. One policy, `policy()`, gives the numbers to all; where a peer lacks
an operation or does less, `PEERS` says so and the row repeats it.

V views of a side of S pixels, B images, N = V * B views of a step, C = 3 channels.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl.augment.augment import Augment
from fastssl.augment.backend import backend_of
from fastssl.augment.policy import View, blur_radius_px
from fastssl.data.batch import Batch
from fastssl.recipe.schema import ViewSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHAIN: dict[str, Any] = {
    "crop": "random_resized", "area_min": 0.08, "area_max": 1.0, "hflip_p": 0.5, "jitter_p": 0.8,
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "hue_mode": "hsv", "jitter_order": "random",
    "gray_p": 0.2, "blur_sigma_min_px": 0.1, "blur_sigma_max_px": 2.0,
    "solarize_p": 0.1, "solarize_threshold": 128 / 255,
}  # fmt: skip
BLUR_P = 0.5

Step = tuple[int, Any]


@dataclass(frozen=True)
class Case:
    """What is measured: `images` is a .npy of uint8 (count, H, W, 3), a step cuts about `step_views` views."""

    images: Path
    side_px: int
    views: int
    blur: bool
    threads: int
    step_views: int
    device: str = "cpu"

    @property
    def batch(self) -> int:
        return max(1, self.step_views // self.views)

    def pool(self) -> np.ndarray:
        pool: np.ndarray = np.load(self.images)
        assert len(pool) >= self.batch, (len(pool), self.batch)
        return pool

    def starts(self) -> Iterator[int]:
        """Where in the pool each step's images begin, for ever."""
        return itertools.cycle(range(0, len(np.load(self.images, mmap_mode="r")) - self.batch + 1, self.batch))


def policy(case: Case) -> View:
    spec = ViewSpec(**CHAIN, side_px=case.side_px, blur_p=BLUR_P if case.blur else 0.0)
    return View(**spec.model_dump(include=set(View.__slots__)))


def fastssl(case: Case, backend: Any) -> Iterator[Step]:
    augment = Augment((policy(case),) * case.views, MEAN, STD, 0, torch.float32, backend_of(backend))
    pool = torch.from_numpy(case.pool()).to(case.device)
    index = torch.arange(len(pool), device=case.device)
    for step, start in enumerate(case.starts()):
        part = slice(start, start + case.batch)
        (views_VBCHW,) = augment(Batch(pool[part], index[part], index[part]), step)
        yield case.batch * case.views, views_VBCHW


def torchvision_chain(package: Any, finish: list[Any], view: View) -> Any:
    """The chain out of `transforms` or `transforms.v2`: both use the same names."""
    chain = [
        package.RandomResizedCrop(view.side_px, (view.area_min, view.area_max), antialias=True),
        package.RandomHorizontalFlip(view.hflip_p),
        package.RandomApply(
            [package.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)], view.jitter_p
        ),
        package.RandomGrayscale(view.gray_p),
    ]
    if view.blur_p:
        blur = package.GaussianBlur(kernel_px(view), (view.blur_sigma_min_px, view.blur_sigma_max_px))
        chain.append(package.RandomApply([blur], view.blur_p))
    chain.append(package.RandomSolarize(round(view.solarize_threshold * 255), view.solarize_p))
    return package.Compose([*chain, *finish, package.Normalize(MEAN, STD)])


def kernel_px(view: View) -> int:
    """As wide as ours at the widest sigma: these libraries have one width for all."""
    return 2 * blur_radius_px(view.blur_sigma_max_px, view.side_px) + 1


class Views(torch.utils.data.Dataset):
    """V views of one image, each by a call of its own."""

    def __init__(self, images: list[Any], transform: Any, views: int) -> None:
        self.images, self.transform, self.views = images, transform, views

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([self.transform(self.images[index]) for _ in range(self.views)])


def torchvision_loader(case: Case, *, version: int) -> Iterator[Step]:
    """Per sample, in as many worker processes as the others have threads; batches small enough to arrive evenly."""
    from PIL import Image
    from torchvision import transforms
    from torchvision.transforms import v2

    pool = case.pool()
    if version == 1:
        images: list[Any] = [Image.fromarray(image) for image in pool]
        transform = torchvision_chain(transforms, [transforms.ToTensor()], policy(case))
    else:
        images = list(torch.from_numpy(pool).permute(0, 3, 1, 2))
        transform = torchvision_chain(v2, [v2.ToDtype(torch.float32, scale=True)], policy(case))
    loader = torch.utils.data.DataLoader(
        Views(images, transform, case.views),
        batch_size=max(1, case.batch // 16),
        sampler=itertools.cycle(range(len(images))),  # type: ignore[arg-type]
        num_workers=case.threads,
    )
    for views_BVCHW in loader:
        yield len(views_BVCHW) * case.views, views_BVCHW


def torchvision_batch(case: Case) -> Iterator[Step]:
    from torchvision.transforms import v2

    transform = torchvision_chain(v2, [v2.ToDtype(torch.float32, scale=True)], policy(case))
    pool = torch.from_numpy(case.pool()).to(case.device).permute(0, 3, 1, 2)
    for start in case.starts():
        batch = pool[start : start + case.batch]
        yield case.batch * case.views, [transform(batch) for _ in range(case.views)]


def kornia(case: Case, *, compiled: bool) -> Iterator[Step]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kornia import augmentation as K

    view = policy(case)
    size, sigmas = (view.side_px, view.side_px), (view.blur_sigma_min_px, view.blur_sigma_max_px)
    jitter = (view.brightness, view.contrast, view.saturation, view.hue)
    mode = "slice" if case.device == "cpu" else "resample"  # image by image, or a batch at once
    chain: list[Any] = [
        K.RandomResizedCrop(size, (view.area_min, view.area_max), align_corners=False, cropping_mode=mode),
        K.RandomHorizontalFlip(p=view.hflip_p),
        K.ColorJitter(*jitter, p=view.jitter_p, order=(0, 1, 2, 3)),  # the order that it can compile
        K.RandomGrayscale(p=view.gray_p),
    ]
    if view.blur_p:
        chain.append(K.RandomGaussianBlur((kernel_px(view),) * 2, sigmas, p=view.blur_p))
    chain.append(K.RandomSolarize((view.solarize_threshold,) * 2, (0.0, 0.0), p=view.solarize_p))
    chain.append(K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    augment = torch.nn.Sequential(*chain).to(case.device)
    call = torch.compile(augment, dynamic=False) if compiled else augment
    pool = torch.from_numpy(case.pool()).to(case.device).permute(0, 3, 1, 2)
    for start in case.starts():
        images = pool[start : start + case.batch].repeat(case.views, 1, 1, 1)
        yield len(images), call(images.float() / 255)


def dali(case: Case) -> Iterator[Step]:
    from nvidia.dali import fn, pipeline_def, types

    view, device = policy(case), "gpu" if case.device == "cuda" else "cpu"
    pool: Any = case.pool()
    if device == "gpu":
        pool = torch.from_numpy(pool).cuda()
    starts = case.starts()

    def images() -> Any:
        start = next(starts)
        return pool[start : start + case.batch]

    def factor(strength: float, on: Any, neutral: float = 1.0) -> Any:
        return neutral + on * fn.random.uniform(range=(-strength, strength))

    def chance(p: float) -> Any:
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    def cut(image: Any) -> Any:
        area = (view.area_min, view.area_max)
        out = fn.random_resized_crop(image, size=(view.side_px, view.side_px), random_area=area)
        on, colored = (fn.random.coin_flip(probability=p) for p in (view.jitter_p, 1 - view.gray_p))
        out = fn.color_twist(
            out,
            brightness=factor(view.brightness, on),
            contrast=factor(view.contrast, on),
            saturation=factor(view.saturation, on) * colored,
            hue=factor(360 * view.hue, on, 0.0),
        )
        if view.blur_p and chance(view.blur_p):
            out = fn.gaussian_blur(out, sigma=fn.random.uniform(range=(view.blur_sigma_min_px, view.blur_sigma_max_px)))
        if chance(view.solarize_p):
            out = fn.cast(out * (out < 128) + (255 - out) * (out >= 128), dtype=types.UINT8)
        return fn.crop_mirror_normalize(
            out,
            dtype=types.FLOAT,
            output_layout="HWC",
            mirror=fn.random.coin_flip(probability=view.hflip_p),
            mean=[255 * x for x in MEAN],
            std=[255 * x for x in STD],
        )

    @pipeline_def(
        batch_size=case.batch,
        num_threads=case.threads,
        device_id=0 if device == "gpu" else None,
        enable_conditionals=True,
    )
    def pipeline() -> Any:
        source = fn.external_source(source=images, batch=True, layout="HWC", no_copy=True, device=device)
        return tuple(cut(source) for _ in range(case.views))

    built = pipeline()
    built.build()
    while True:
        yield case.batch * case.views, built.run()


def ffcv(case: Case) -> Iterator[Step]:
    """FFCV's operations compiled as its loader compiles them, on the images in memory, into memory it keeps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FFCV imports distutils
        from ffcv import transforms as T
        from ffcv.pipeline.compiler import Compiler
    Compiler.set_num_threads(case.threads)
    crop, flip, brightness, contrast, saturation, normalize = ffcv_operations(policy(case), T, Compiler)
    pool, batch, side = case.pool(), case.batch, case.side_px
    cropped, flipped = (np.empty((batch, side, side, 3), np.uint8) for _ in range(2))
    out_VBHWC = np.empty((case.views, batch, side, side, 3), np.float32)
    indices = np.arange(batch)
    for start in case.starts():
        for v in range(case.views):
            images = flip(crop(pool[start : start + batch], cropped), flipped)
            normalize(saturation(contrast(brightness(images))), out_VBHWC[v], indices)
        yield batch * case.views, out_VBHWC


_compiled: dict[int, list[Any]] = {}


def ffcv_operations(view: View, T: Any, compiler: Any) -> list[Any]:
    """Compiled once for all sides: the code knows none of them."""
    if compiler.num_threads not in _compiled:
        operations = [
            T.RandomResizedCrop((view.area_min, view.area_max), (view.aspect_min, view.aspect_max), view.side_px),
            T.RandomHorizontalFlip(view.hflip_p),
            T.RandomBrightness(view.brightness, view.jitter_p),
            T.RandomContrast(view.contrast, view.jitter_p),
            T.RandomSaturation(view.saturation, view.jitter_p),
            T.NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32),
        ]
        _compiled[compiler.num_threads] = [compiler.compile(one.generate_code()) for one in operations]
    return _compiled[compiler.num_threads]


def copy(case: Case) -> Iterator[Step]:
    """Finished views copied within memory: the ceiling that no augmentation passes."""
    shape = (case.views, case.batch, case.side_px, case.side_px, 3)
    source, target = (torch.zeros(shape, device=case.device) for _ in range(2))
    while True:
        yield case.batch * case.views, target.copy_(source)


@dataclass(frozen=True)
class Peer:
    """Attributes: what makes the steps, where it can run, and what it does less or otherwise."""

    steps: Callable[[Case], Iterator[Step]]
    devices: tuple[str, ...] = ("cpu",)
    note: str = ""
    blurs: bool = True


BOTH = ("cpu", "cuda")
PROCESSES = "threads are worker processes"
KORNIA = "one jitter order for all; no antialias"
PEERS: dict[str, Peer] = {
    "fastssl-cpu": Peer(partial(fastssl, backend="cpu")),
    "fastssl-cuda": Peer(partial(fastssl, backend="cuda"), ("cuda",)),
    "fastssl-torch": Peer(partial(fastssl, backend="torch"), BOTH),
    "dali": Peer(dali, BOTH, "hue linear, contrast about mid-gray, one jitter order for all"),
    "ffcv": Peer(ffcv, note="no hue, gray, solarize; each factor drawn apart; rounds after each", blurs=False),
    "torchvision-v1": Peer(partial(torchvision_loader, version=1), note=PROCESSES),
    "torchvision-v2": Peer(partial(torchvision_loader, version=2), note=PROCESSES),
    "torchvision-v2-batch": Peer(torchvision_batch, BOTH, "one draw for a whole batch and view"),
    "kornia": Peer(partial(kornia, compiled=False), BOTH, KORNIA),
    "kornia-compiled": Peer(partial(kornia, compiled=True), BOTH, KORNIA),
    "copy": Peer(copy, BOTH, "no augmentation: finished views copied"),
}
