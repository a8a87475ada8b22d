"""One contract for every loader: the same samples, in the same order, whoever decodes them."""

import gc
import importlib
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fastssl.augment.draws import permutation
from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton, BetonWriter
from fastssl.data.loaders import resident
from fastssl.data.loaders.choose import choose, installed
from fastssl.data.loaders.plan import Plan
from fastssl.data.loaders.threads import prefetch, spread
from fastssl.errors import UserError
from fastssl.runs.machine import free_host_bytes

COUNT = 53
LOADERS = ("resident", "in place", "host", "mmap", "ffcv", "dali")
FILES = ("raw", "jpg", "mixed", "ragged", "ragged_jpg", "uint16")


def picture(i: int, height: int, width: int) -> np.ndarray:
    """Smooth, so that JPEG keeps it recognizable, and different for each i: (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(x * 7 + i * 3) % 256, (y * 5 + i * 11) % 256, (x + y + i) % 256], axis=2).astype(np.uint8)


def write(path: Path, name: str) -> None:
    mode = {"raw": "raw", "jpg": "jpg", "ragged_jpg": "jpg", "mixed": "smart"}.get(name, "raw")
    channels, dtype = (2, "uint16") if name == "uint16" else (3, "uint8")
    with BetonWriter(path, mode=mode, smart_bytes=3000, channels=channels, dtype=dtype) as writer:
        for i in range(COUNT):
            is_ragged = name.startswith("ragged") or name == "mixed"
            image = picture(i, 24 + i % 7 * is_ragged, 40 + i % 5 * 2 * is_ragged)
            writer.add(image[..., :2].astype(np.uint16) * 257 if name == "uint16" else image, i % 10)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("betons")
    for name in FILES:
        write(folder / f"{name}.beton", name)
    return folder


def open_loader(kind: str, path: Path, **options: object):
    options = {"device": "cpu", "batch_size": 8, "order": partial(shuffled, 7), **options}
    if kind in ("ffcv", "dali"):
        pytest.importorskip({"dali": "nvidia.dali"}.get(kind, kind), reason=f"{kind} is not installed")
        return importlib.import_module(f"fastssl.data.loaders.{kind}").open_loader(path, **options)
    memory = "device" if kind in ("resident", "in place") else kind
    return resident.open_loader(path, memory=memory, in_place=kind == "in place", **options)


def shuffled(seed: int, epoch: int, count: int = COUNT) -> torch.Tensor:
    return permutation(seed, epoch, count)


def in_order(count: int, epoch: int) -> torch.Tensor:
    return torch.arange(count)


def image_of(batch: Batch, k: int) -> np.ndarray:
    if batch.offsets_B is None:
        return batch.images[k].numpy()
    height, width = batch.sizes_B2[k].tolist()
    channels = 2 if batch.images.dtype == torch.uint16 else 3
    start = int(batch.offsets_B[k])
    return batch.images[start : start + height * width * channels].view(height, width, channels).numpy()


def indices(batches) -> list[int]:
    return [i for batch in batches for i in batch.index_B.tolist()]


def threads() -> list[str]:
    """Python's threads that loaders may have started (FFCV names none)."""
    return sorted(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", LOADERS)
def test_every_sample_once_in_the_given_order_with_its_pixels_and_label(files, kind, name):
    path = files / f"{name}.beton"
    loader, beton = open_loader(kind, path, drop_last=False), Beton(path)
    batches = list(loader.epoch(3))  # held, so that a buffer used twice would show
    assert indices(batches) == shuffled(7, 3).tolist()
    assert len(batches) == len(loader) == 7
    assert [len(batch) for batch in batches] == [8] * 6 + [5]
    for batch in batches:
        for k, i in enumerate(batch.index_B.tolist()):
            np.testing.assert_array_equal(image_of(batch, k), beton.image(i))
            assert batch.labels_B[k] == i % 10
    assert loader.labels.tolist() == [i % 10 for i in range(COUNT)]
    assert loader.image_shape == (None if "ragged" in name or name == "mixed" else beton.image(0).shape)


@pytest.mark.parametrize("kind", LOADERS)
def test_order_depends_on_seed_and_epoch_alone(files, kind):
    loader = open_loader(kind, files / "jpg.beton")
    first = indices(loader.epoch(0))
    assert first == shuffled(7, 0).tolist()[:48]
    assert indices(loader.epoch(1)) == shuffled(7, 1).tolist()[:48]
    assert indices(loader.epoch(0)) == first
    assert indices(open_loader(kind, files / "jpg.beton", order=partial(shuffled, 8)).epoch(0)) != first


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", LOADERS)
def test_ranks_share_each_global_batch_without_overlap(files, kind, world, drop_last):
    options = {"world": world, "drop_last": drop_last, "batch_size": 16}
    ranks = [open_loader(kind, files / "mixed.beton", rank=rank, **options) for rank in range(world)]
    steps = zip(*(loader.epoch(2) for loader in ranks), strict=True)
    found = [[i for batch in step for i in batch.index_B.tolist()] for step in steps]
    expected = shuffled(7, 2).tolist()
    assert found == [expected[k : k + 16] for k in range(0, 48 if drop_last else COUNT, 16)]


@pytest.mark.parametrize("kind", LOADERS)
def test_fewer_samples_in_the_last_batch_than_ranks(files, kind):
    chosen = torch.arange(9)
    ranks = [
        open_loader(
            kind,
            files / "raw.beton",
            indices=chosen,
            order=partial(shuffled, 1, count=9),
            drop_last=False,
            rank=rank,
            world=4,
        )
        for rank in range(4)
    ]
    last = [list(loader.epoch(0))[-1] for loader in ranks]
    assert sorted(len(batch) for batch in last) == [0, 0, 0, 1]
    if kind != "in place":
        assert all(batch.images.shape[1:] == (24, 40, 3) for batch in last)


@pytest.mark.parametrize("kind", LOADERS)
def test_restart_at_any_step(files, kind):
    loader = open_loader(kind, files / "ragged_jpg.beton", drop_last=False)
    whole = [batch.index_B.tolist() for batch in loader.epoch(5)]
    for start in range(len(whole) + 1):
        assert [batch.index_B.tolist() for batch in loader.epoch(5, start)] == whole[start:]


@pytest.mark.parametrize("kind", LOADERS)
def test_chosen_images_keep_their_positions_in_the_file_and_a_subset_shares_the_store(files, kind):
    chosen = torch.tensor([40, 3, 17, 5, 52, 0, 9, 33, 21])
    loader = open_loader(kind, files / "raw.beton", indices=chosen, order=partial(shuffled, 2, count=9), batch_size=4)
    assert indices(loader.epoch(0)) == chosen[shuffled(2, 0, 9)].tolist()[:8]
    orders = [partial(in_order, count) for count in (5, 4)]
    parts = [loader.subset(batch_size=6, order=orders[k], indices=chosen[k::2], drop_last=False) for k in (0, 1)]
    streams = [part.epoch(0) for part in parts]  # one of them with batches larger than the store has seen
    for part, batches in zip((chosen[::2], chosen[1::2]), streams, strict=True):
        (batch,) = batches
        assert batch.index_B.tolist() == part.tolist()
        assert batch.labels_B.tolist() == (part % 10).tolist()
        for k, i in enumerate(part.tolist()):
            np.testing.assert_array_equal(image_of(batch, k), Beton(files / "raw.beton").image(i))


@pytest.mark.parametrize("kind", LOADERS)
def test_a_subset_keeps_the_ranks_it_is_given(files, kind):
    loader = open_loader(kind, files / "mixed.beton", rank=1, world=2)
    ranks = [
        loader.subset(batch_size=8, order=partial(shuffled, 3), drop_last=False, rank=rank, world=4)
        for rank in range(4)
    ]
    steps = zip(*(rank.epoch(0) for rank in ranks), strict=True)
    assert [i for step in steps for batch in step for i in batch.index_B.tolist()] == shuffled(3, 0).tolist()


def test_a_batch_in_place_copies_nothing(files):
    one, two = list(open_loader("in place", files / "raw.beton").epoch(0))[:2]
    assert one.images.shape == (COUNT * 24 * 40 * 3,)
    assert one.images.data_ptr() == two.images.data_ptr()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", LOADERS)
def test_padded_batches_hold_the_same_images_with_zeros_around_them(files, kind, name):
    plain = "resident" if kind == "in place" else kind
    flat, padded = (open_loader(k, files / f"{name}.beton", layout=n) for k, n in ((plain, "flat"), (kind, "padded")))
    for expected, batch in zip(flat.epoch(1), padded.epoch(1), strict=True):
        assert batch.offsets_B is None
        assert torch.equal(batch.index_B, expected.index_B)
        assert torch.equal(batch.labels_B, expected.labels_B)
        if expected.sizes_B2 is None:
            assert torch.equal(batch.images, expected.images)
            continue
        assert torch.equal(batch.sizes_B2, expected.sizes_B2)
        assert batch.images.shape == (8, *expected.sizes_B2.amax(0).tolist(), 3)
        for k, (height, width) in enumerate(batch.sizes_B2.tolist()):
            np.testing.assert_array_equal(batch.images[k, :height, :width].numpy(), image_of(expected, k))
        assert int(batch.images.sum(dtype=torch.int64)) == sum(
            int(image_of(expected, k).sum(dtype=np.int64)) for k in range(8)
        )


@pytest.mark.parametrize("kind", LOADERS)
def test_breaking_off_leaves_no_thread_and_the_loader_usable(files, kind):
    loader = open_loader(kind, files / "jpg.beton")
    before = threads()
    for stop in (0, 1, 3):
        for step, _ in enumerate(loader.epoch(0)):
            if step == stop:
                break
        gc.collect()
        assert threads() == before
    assert indices(loader.epoch(0)) == shuffled(7, 0).tolist()[:48]


@pytest.mark.parametrize("kind", LOADERS)
def test_two_loaders_and_two_epochs_of_one_loader_at_once(files, kind):
    one, two = (open_loader(kind, files / name) for name in ("jpg.beton", "ragged.beton"))
    streams = (one.epoch(0), two.epoch(1), one.epoch(2))
    found = list(zip(*streams, strict=True))
    for epoch, batches in enumerate(zip(*found, strict=True)):
        assert indices(batches) == shuffled(7, epoch).tolist()[:48]


@pytest.mark.parametrize("kind", LOADERS)
def test_120_epochs_leave_nothing_behind(files, kind):
    loader, process = open_loader(kind, files / "ragged_jpg.beton"), psutil.Process()

    def run(epochs: int) -> tuple[int, list[str], int]:
        for epoch in range(epochs):
            assert len(list(loader.epoch(epoch))) == 6
        gc.collect()
        return process.memory_info().rss, threads(), process.num_fds()

    run(20)  # allocators and pools find their size
    rss_before, *before = run(20)
    rss_after, *after = run(80)
    assert after == before
    assert rss_after - rss_before < 16 << 20  # one batch kept per epoch would be 20 MiB


@pytest.mark.parametrize("kind", ["mmap", "ffcv", "dali"])
def test_no_thread_outlives_an_iteration_that_is_never_closed(files, kind):
    """One that comes back from C++ to an interpreter that is gone would abort the process."""
    if kind != "mmap":
        pytest.importorskip({"dali": "nvidia.dali"}.get(kind, kind), reason=f"{kind} is not installed")
    script = f"""
import atexit, os, threading
before = {{t.name for t in threading.enumerate()}}
def look():  # after every other function registered
    left = [t.name for t in threading.enumerate() if t.name not in before]
    print(left)
    os._exit(len(left))
atexit.register(look)
import torch
from pathlib import Path
from fastssl.data.loaders import {"resident" if kind == "mmap" else kind} as module
options = {"dict(memory='mmap')" if kind == "mmap" else "{}"}
loader = module.open_loader(
    Path({str(files / "jpg.beton")!r}), device="cpu", batch_size=4, order=lambda _: torch.arange({COUNT}), **options
)
held = [loader.epoch(0)]
held.append(held)  # a cycle: no count of references closes it
next(held[0])
assert threading.active_count() > 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_is_closed_with_its_loader(files, kind):
    def maps() -> int:
        return sum("jpg.beton" in region.path for region in psutil.Process().memory_maps(grouped=False))

    gc.collect()
    before = maps()
    loader = open_loader(kind, files / "jpg.beton")
    next(iter(loader.epoch(0)))
    del loader
    gc.collect()
    assert maps() == before


@pytest.mark.parametrize("kind", LOADERS)
def test_a_broken_jpeg_is_an_error_that_names_the_sample(tmp_path, kind):
    from fastssl.data.formats.jpeg import encode as encode_jpeg

    path = tmp_path / "broken.beton"
    with BetonWriter(path, mode="jpg") as writer:
        for i in range(16):
            data = encode_jpeg(picture(i, 64, 64), quality=90)
            writer.add(data[: len(data) // 2] if i == 11 else data)
    before = threads()
    with pytest.raises(UserError, match="sample 11"):
        list(open_loader(kind, path, order=lambda _: torch.arange(16)).epoch(0))
    gc.collect()
    assert threads() == before


@pytest.mark.parametrize("kind", ["mmap", "ffcv", "dali"])
def test_a_hang_becomes_an_error_and_every_stack_is_told(files, kind, monkeypatch, capfd):
    release = threading.Event()
    loader = open_loader(kind, files / "jpg.beton", **({} if kind == "mmap" else {"limit_s": 0.3}))
    if kind == "mmap":
        stuck = (release.wait(30) for _ in range(3))
        batches = prefetch(stuck, limit_s=0.3)
    elif kind == "ffcv":
        monkeypatch.setattr(loader.store, "decode", lambda **_: release.wait(30))
        batches = loader.epoch(0)
    else:
        monkeypatch.setattr(loader.store, "_decode", lambda *_: release.wait(30))
        batches = loader.epoch(0)
    try:
        with pytest.raises(UserError, match=r"No batch arrived within 0\.3 seconds"):
            next(batches)
    finally:
        release.set()
    printed = capfd.readouterr().err
    assert printed.count("most recent call first") >= 2
    assert "in wait" in printed  # where it hangs


def test_a_dead_ffcv_thread_is_an_error(files, monkeypatch):
    loader = open_loader("ffcv", files / "jpg.beton", limit_s=20)
    monkeypatch.setattr(loader.store, "decode", lambda **_: 1 / 0)
    with pytest.raises(RuntimeError, match="ended early"):
        next(loader.epoch(0))


def test_breaking_off_ends_ffcvs_decoding(files, monkeypatch):
    """And does not decode the rest of the epoch, which of a large set takes minutes."""
    loader, decoded = open_loader("ffcv", files / "jpg.beton"), []
    honest = loader.store.decode

    def decode(batch_indices, *arguments, **options):
        decoded.append(len(batch_indices))
        time.sleep(0.02)  # else it is done before anyone can break off
        return honest(batch_indices, *arguments, **options)

    monkeypatch.setattr(loader.store, "decode", decode)
    batches = loader.subset(batch_size=1, order=partial(shuffled, 7), indices=None, drop_last=True).epoch(0)
    next(batches)
    batches.close()
    assert 1 <= len(decoded) < COUNT / 2


@pytest.mark.parametrize("kind", LOADERS)
def test_torch_keeps_its_number_of_threads(files, kind):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(open_loader(kind, files / "jpg.beton").epoch(0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", LOADERS)
def test_wrong_numbers_are_errors_with_a_remedy(files, kind):
    path = files / "raw.beton"
    with pytest.raises(UserError, match="larger than the set of 53 images"):
        open_loader(kind, path, batch_size=54)
    with pytest.raises(UserError, match=r"Set data\.batch_size to 6 or 9"):
        open_loader(kind, path, batch_size=8, world=3)
    with pytest.raises(UserError, match="leave the 53 samples"):
        open_loader(kind, path, indices=torch.tensor([53]), batch_size=1)
    with pytest.raises(UserError, match="does not exist"):
        open_loader(kind, path.with_name("absent.beton"))


def test_plan_counts_steps():
    def steps(count: int, batch: int, drop: bool) -> int:
        return len(Plan.make(count, batch_size=batch, order=torch.arange, drop_last=drop))

    assert [steps(10, 5, True), steps(10, 4, True), steps(10, 4, False), steps(3, 4, False)] == [2, 2, 3, 1]


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_what_memory_cannot_hold_is_refused(files, kind, monkeypatch):
    monkeypatch.setattr("fastssl.data.loaders.layout.free_host_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"data\.memory to mmap"):
        open_loader(kind, files / "raw.beton")


def test_prefetch_passes_errors_on_and_makes_one_item_early():
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i
        raise ValueError("broken")

    stream = prefetch(items())
    assert next(stream) == 0
    assert next(stream) == 1
    assert max(made) <= 2
    assert [next(stream), next(stream)] == [2, 3]
    with pytest.raises(ValueError, match="broken"):
        next(stream)


@pytest.mark.parametrize("workers", [1, 3])
def test_spread_visits_each_once_and_raises_the_first_error(workers):
    seen = []
    spread(seen.append, 1000, workers)
    assert sorted(seen) == list(range(1000))
    with pytest.raises(ZeroDivisionError):
        spread(lambda i: 1 // (i - 500), 1000, workers)


@pytest.mark.parametrize(
    ("size", "is_jpeg", "device", "ffcv", "dali", "name"),
    [
        (6, True, "cuda", True, True, "resident"),
        (8, True, "cuda", True, True, "dali"),
        (8, False, "cuda", True, True, "ffcv"),
        (8, True, "cpu", True, True, "ffcv"),
        (8, True, "cpu", False, True, "dali"),
        (8, True, "cuda", False, False, "resident"),
    ],
)
def test_choice_of_loader(size, is_jpeg, device, ffcv, dali, name):
    found, reason = choose(
        size * 10**9, is_jpeg=is_jpeg, device=device, free_bytes=10**10, has_ffcv=ffcv, has_dali=dali
    )
    assert found == name
    assert f"{size} GB" in reason


def test_what_is_known_about_the_machine():
    assert installed("numpy")
    assert not installed("no_such_package.at_all")
    assert 0 < free_host_bytes() <= psutil.virtual_memory().total
