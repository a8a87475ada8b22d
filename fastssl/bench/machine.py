"""The machine check: each stage of a recipe's step with its rate, its share and how near it comes to the ceilings.

The stages are timed inside real steps, the device waited for after each; the whole step is timed again without those
waits. Ceilings are measured, not looked up. Within two minutes: slow steps get a smaller batch, and the record says so.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl import build
from fastssl.bench.ceilings import ceilings, highest
from fastssl.bench.parts import Parts, parts, work
from fastssl.bench.record import record, row
from fastssl.bench.timing import Laps, side_by_side, waiter
from fastssl.models import pretrainer
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.training.guards import torch_settings
from fastssl.training.online_probes import Prober

MAX_STEP_S = 4.0
EVALUATION_S = 20.0
# Numbers of four bytes that an update reads and writes per parameter: weight, gradient and moments, then all but the
# gradient back; LARS also reads weight and gradient for its norms. Muon's products are not in it.
OPTIMIZER_TRAFFIC = {"adam": 7, "adamw": 7, "sgd": 5, "lars": 7, "muon": 7}
Say = Callable[[str], None]


def machine_check(recipe: Recipe, *, seconds: float = 30.0, say: Say = lambda text: None) -> dict[str, Any]:
    """The benchmark record of every stage, with `bottleneck` and `notes` next to its rows.

    Args:
        recipe: whose data file exists.
        seconds: spent on steps, after the warm-up; ceilings and evaluation take up to 30 more.
        say: called with what is being measured.
    """
    with torch_settings(recipe):
        return checked(*bearable(recipe), seconds=seconds, say=say)


def checked(recipe: Recipe, notes: list[str], *, seconds: float, say: Say) -> dict[str, Any]:
    """`machine_check` of a recipe whose steps are bearable."""
    run = parts(recipe)
    wait = waiter(run.device)
    say("Ceilings: a matrix product and a copy")
    best = ceilings(run.device, build.hardware.autocast(recipe) or torch.float32, wait=wait)
    say("Stages of a step")
    laps = repeated_phases(run, wait, seconds=seconds / 2)
    say("Whole steps")
    whole = whole_steps(run, wait, seconds=seconds / 2)
    rows = stage_rows(run, laps, best)
    rows += whole
    copied, note = transfer(run, wait)
    rows += copied
    notes += note
    say("Evaluation")
    evaluated, note = evaluation(run, wait, step_s=whole[0]["median"] / 1e3)
    rows += evaluated
    notes += note
    return record(
        "machine",
        best + rows,
        recipe.model_dump(mode="json"),
        data_digest=run.manifest.digest,
        warmup="two steps untimed, and as long as a window before windows",
        bottleneck=bottleneck(rows),
        notes=notes,
    )


def bearable(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe, or the same with the batch halved until a step is likely to stay under MAX_STEP_S."""
    batch, least = recipe.data.batch_size, build.model.few_images(load(recipe, ["optim.accumulate_steps=1"]), 8)
    small = load(recipe, [f"data.batch_size={least}", "train.compile=false", "optim.accumulate_steps=1"])
    run = parts(small)
    batches, wait = run.batches(), waiter(run.device)
    run.phases(batches, wait)
    seconds = run.phases(batches, wait)
    update_s = seconds.pop("optimizer")  # whatever the batch
    per_image_s = sum(seconds.values()) / small.data.batch_size
    fitting = batch
    while fitting > least and update_s + fitting * per_image_s > MAX_STEP_S:
        fitting = max(fitting // 2, least)
    if fitting == batch:
        return recipe, []
    step_s = update_s + batch * per_image_s
    note = f"A step of {batch} images takes about {step_s:.0f} s here: measured with {fitting} instead."
    return load(recipe, [f"data.batch_size={fitting}", "optim.accumulate_steps=1"]), [note]


def repeated_phases(run: Parts, wait: Callable[[], None], *, seconds: float, most: int = 50) -> list[dict[str, float]]:
    """Laps of steps, two and then at least three, at most `most`, until the seconds are over."""
    batches = run.batches()
    for _ in range(2):
        run.phases(batches, wait)
    laps: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(laps) < 3 or (len(laps) < most and time.perf_counter() - start < seconds):
        laps.append(run.phases(batches, wait))
    return laps


def whole_steps(run: Parts, wait: Callable[[], None], *, seconds: float, rounds: int = 5) -> list[dict[str, Any]]:
    """Rows of the step as training runs it, nothing waited for in between."""
    groups = run.trained_on()

    def step() -> int:
        run.step(next(groups))
        return run.batch_size

    rates = side_by_side({"step": step}, wait=wait, window_s=seconds / (rounds + 1), rounds=rounds)["step"]
    what = {"stage": "step"} | work(run.recipe, run.device)
    return [
        row("fastssl", what, "ms_per_step", [1e3 * run.batch_size / rate for rate in rates]),
        row("fastssl", what, "images_per_s", rates),
        row("fastssl", what, "views_per_s", [rate * what["views"] for rate in rates]),
    ]


def stage_rows(run: Parts, laps: list[dict[str, float]], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds, images per second and share of the step of every stage; its share of the ceiling that binds it."""
    rows = []
    flops, traffic = stage_flops(run), stage_bytes(run)
    for stage in laps[0]:
        what = {"stage": stage} | work(run.recipe, run.device)
        seconds = [lap[stage] for lap in laps]
        rows.append(row("fastssl", what, "ms_per_step", [1e3 * s for s in seconds]))
        rows.append(row("fastssl", what, "images_per_s", [run.batch_size / s for s in seconds]))
        rows.append(row("fastssl", what, "share_pct", [100 * lap[stage] / sum(lap.values()) for lap in laps]))
        if stage in flops:
            ceiling = 1e12 * highest(best, "matmul")
            rows.append(row("fastssl", what, "compute_pct", [100 * flops[stage] / s / ceiling for s in seconds]))
        if stage in traffic:
            ceiling = 1e9 * highest(best, "copy")
            rows.append(row("fastssl", what, "bandwidth_pct", [100 * traffic[stage] / s / ceiling for s in seconds]))
    return rows


def stage_flops(run: Parts) -> dict[str, float]:
    """Operations of convolutions and matrix products, counted by running one step of the uncompiled network."""
    batch, epoch = next(run.batches())
    step, views = replace(run.train_step, network=run.plain, compiled=None), run.views(batch, epoch)
    with FlopCounterMode(display=False) as forward:
        terms = step.forward(views)
    with FlopCounterMode(display=False) as backward:
        step.backward(terms)
    step.optimizer.zero_grad(set_to_none=True)
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def stage_bytes(run: Parts) -> dict[str, float]:
    """Bytes that a stage cannot avoid reading and writing."""
    batch, epoch = next(run.batches())
    groups = run.views(batch, epoch)
    is_copied = batch.offsets_B is None
    elements = batch.images.numel()
    if not is_copied:
        assert batch.sizes_B2 is not None
        elements = int(batch.sizes_B2.prod(dim=1).sum()) * run.manifest.channels
    pixels = elements * batch.images.element_size()
    cut = sum(group.numel() * group.element_size() for group in groups)
    update = 4 * OPTIMIZER_TRAFFIC[run.recipe.optim.name] * pretrainer.parameter_count(run.plain)
    traffic_bytes = {"augmentation": float(pixels + cut), "optimizer": float(update)}
    return traffic_bytes | ({"loader": 2.0 * pixels} if is_copied else {})


def transfer(run: Parts, wait: Callable[[], None]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a batch's copy from pinned host memory; none where host and device are one."""
    if run.device.type != "cuda":
        return [], [f"host-to-device: nothing to copy, the images lie in the memory of the {run.device.type}."]
    batch, _ = next(run.batches())
    host = batch.images.cpu().pin_memory()

    def copy() -> int:
        host.to(run.device, non_blocking=True)
        return len(batch)

    rates = side_by_side({"copy": copy}, wait=wait, window_s=0.2, rounds=5)["copy"]
    what = {"stage": "host-to-device"} | work(run.recipe, run.device)
    gb = host.numel() * host.element_size() / len(batch) / 1e9
    rows = [
        row("fastssl", what, "ms_per_step", [1e3 * len(batch) / rate for rate in rates]),
        row("fastssl", what, "images_per_s", rates),
        row("fastssl", what, "gb_per_s", [rate * gb for rate in rates]),
    ]
    return rows, ["host-to-device: one pinned batch by itself; a resident loader copies nothing, others copy ahead."]


def evaluation(run: Parts, wait: Callable[[], None], *, step_s: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one evaluation while training: its seconds, and what it costs a step at the recipe's frequency."""
    recipe, data = run.recipe, run.recipe.data
    learn = build.data.some_of(run.sets.probe, recipe.evaluate.max_train)
    images = len(learn) + len(run.sets.val)
    if not len(learn) or not len(run.sets.val):
        return [], ["evaluation: no labeled images are held out, so there is none while training."]
    clean = build.views.clean_view(recipe, run.manifest, device=run.device)
    share = run.loader if data.probe_path is None else None
    prober = Prober(recipe, data.probe_path or data.path, run.sets, clean=clean, device=run.device, share=share)
    estimate_s, notes = images / extraction_rate(prober, run, wait), []
    seconds = [estimate_s]
    if estimate_s < EVALUATION_S:
        laps = Laps(wait)
        prober.while_training(run.plain.backbone)
        laps("evaluation")
        seconds = [laps.seconds["evaluation"]]
    else:
        notes = ["evaluation: from the rate of feature extraction; the probes on top of it are not counted."]
    what = {"stage": "evaluation", "images": images} | work(recipe, run.device)
    steps = steps_between_evaluations(recipe, len(run.loader))
    return [
        row("fastssl", what, "seconds", seconds),
        row("fastssl", what, "ms_per_step", [1e3 * s / steps for s in seconds]),
        row("fastssl", what, "share_pct", [100 * s / steps / (s / steps + step_s) for s in seconds]),
        row("fastssl", what, "images_per_s", [images / s for s in seconds]),
    ], notes


def steps_between_evaluations(recipe: Recipe, steps_per_epoch: int) -> float:
    """On average, and infinite for those at the end only; where both settings are due, there is one evaluation."""
    every = [recipe.evaluate.every_epochs * steps_per_epoch, recipe.evaluate.every_steps]
    per_step = sum(1 / steps for steps in every if steps) - (1 / math.lcm(*every) if all(every) else 0)
    return 1 / per_step if per_step else math.inf


def extraction_rate(prober: Prober, run: Parts, wait: Callable[[], None]) -> float:
    """Images per second through the frozen backbone, from the second and third batch."""
    embed = prober.embed_with(run.plain.backbone)
    assert prober.learn is not None
    rates = []
    with torch.inference_mode():
        for _, batch in zip(range(3), prober.learn.epoch(0), strict=False):
            laps = Laps(wait)
            embed(batch)
            laps("batch")
            rates.append(len(batch) / laps.seconds["batch"])
    return max(rates)


def bottleneck(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The stage with the largest share, and in words how near it comes to the ceilings."""
    shares = {row["work"]["stage"]: row["median"] for row in rows if row["metric"] == "share_pct"}
    stage = max(shares, key=lambda name: shares[name])
    of = {row["metric"]: row["median"] for row in rows if row["work"]["stage"] == stage}
    ceilings_of = {"compute_pct": "matrix product", "bandwidth_pct": "copy"}
    said = ", ".join(f"{of[key]:.0f} % of this machine's {name}" for key, name in ceilings_of.items() if key in of)
    return {
        "stage": stage,
        "share_pct": shares[stage],
        "text": f"{stage} takes {shares[stage]:.0f} % of a step" + (f", at {said}" if said else "") + ".",
    }
