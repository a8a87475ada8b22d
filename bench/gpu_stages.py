"""The stages of bench/gpu_suite.py, the most telling first: what each runs on a GPU, and at tiny size without one.

Limits in minutes are estimates for one H100, not measured.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
CUDA_PEERS = ["fastssl-cuda", "fastssl-torch", "torchvision-v2-batch", "kornia", "kornia-compiled", "dali", "copy"]
PHOTOGRAPHS = "data/photographs.beton"
RESNET18 = ["-s", "model.backbone=resnet18"]
TESTS = [
    "augment/test_cuda*.py",
    "training/test_no_sync.py",
    "training/test_step_graph.py",
    "training/test_on_cuda.py",
    "training/test_loop.py",
    "data/test_loaders.py",
]
TESTS_DRY = ["augment/test_draws.py", "training/test_no_sync.py"]


@dataclass(frozen=True)
class Setting:
    """Attributes: what to convert, an absolute folder for results, whether this is a dry run, and a stage's limit."""

    source: str
    out: Path
    dry: bool
    limit_min: float = 60.0

    def recipe(self, name: str) -> list[str]:
        """A shipped recipe on the suite's data, or the tiny one."""
        if self.dry:
            return [str(ROOT / "bench" / "gpu_dry.yaml")]
        return [name, *self.changes(), "-s", "evaluate.linear_epochs=0"]

    def changes(self) -> list[str]:
        """Point a recipe at the suite's data; paths relative to --out, so that another machine can continue a run."""
        paths = ["data.path=data/train.beton", "data.test_path=data/test.beton", f"data.source={self.source}"]
        return [word for change in paths for word in ("-s", change)]


Words = Callable[[Setting, Path], list[str]]


@dataclass(frozen=True)
class Stage:
    """Attributes: words after `python` (they write the record to the path given), limits in minutes, packages it needs,
    a file in --out that an earlier stage makes, and the file that this one makes for later ones."""

    name: str
    title: str
    words: Words
    least_min: float
    most_min: float
    needs: tuple[str, ...] = ()
    file: str = ""
    makes: str = ""
    dry_environment: dict[str, str] = field(default_factory=lambda: dict(INTERPRETED))

    def holds(self, setting: Setting) -> bool:
        """Whether what it has made is still there: on another machine it is not."""
        return not self.makes or (setting.out / self.makes).exists()

    def missing(self, setting: Setting) -> str:
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed"
        return f"{self.file} is not there" if self.file and not (setting.out / self.file).exists() else ""


def interprets() -> bool:
    """Whether Triton's interpreter runs our kernels: before 3.7 it makes ints of arrays of one element, which NumPy 2.5
    refuses."""
    if importlib.util.find_spec("triton") is None:
        return False
    triton, numpy = (Version(importlib.metadata.version(name)) for name in ("triton", "numpy"))
    return triton >= Version("3.7") or numpy < Version("2.5")


def stages(setting: Setting) -> list[Stage]:
    """All of them, in the order in which they run. The dry run leaves out what differs in size alone."""
    by_torch = (
        ", views cut by torch: Triton's interpreter does not run here" if setting.dry and not interprets() else ""
    )
    every = [
        Stage("smoke", "what works here, and one short training", smoke, 0.3, 2),
        Stage("gpu-tests", "the tests that need a GPU", tests, 0.3, 2, ("pytest",)),
        Stage("machine", "every stage of a step against the ceilings", machine, 0.3, 1.5),
        Stage("resnet50", "ResNet-50: four recipes for equal seconds", resnet50, 5, 9),
        Stage("epoch", "an epoch of ResNet-50, one setting changed at a time", epoch, 2, 6),
        Stage("step-resnet18", f"the step of ResNet-18 at 32 px{by_torch}", step("resnet18"), 0.5, 2),
        Stage("step-resnet50", "the step of ResNet-50 at 32 px", step("resnet50"), 0.7, 2.5),
        Stage("augment-32", "augmentation against its peers at 32 px", augment(32), 0.7, 3),
        Stage("augment-224", "augmentation against its peers at 224 px", augment(224), 0.7, 3),
        Stage("photographs", "photographs to measure with at 224 px", photographs, 0.3, 2, makes=PHOTOGRAPHS),
        on_photographs("step-resnet50-224", "the step of ResNet-50 at 224 px", step_224("resnet50")),
        on_photographs("step-vit_small-224", "the step of ViT-S at 224 px", step_224(VIT), needs=("timm",)),
        Stage("tta", "time to accuracy, low-dimensional against the baseline", tta("resnet18", seeds=1), 3, 8),
        Stage("peers", "time to accuracy against lightly and a plain loop", peers, 2, 5),
        Stage("loader", "loaders side by side", loader, 0.3, 1.5),
        on_photographs("loader-224", "loaders side by side on photographs", loader_224),
        Stage("claims", "the paper's claims with ResNet-18, short runs", claims(full=False), 4, 60),
        Stage("tta-seeds", "time to accuracy with three seeds", tta("resnet18", seeds=3), 5, 60),
        Stage("tta-resnet50", "time to accuracy of ResNet-50", tta("resnet50", seeds=3), 10, 180),
        Stage("claims-full", "the paper's claims at full size", claims(full=True), 60, 600),
    ]
    only_larger = {
        "epoch",
        "step-resnet50",
        "augment-224",
        "step-vit_small-224",
        "tta-seeds",
        "tta-resnet50",
        "claims-full",
    }
    return [stage for stage in every if not setting.dry or stage.name not in only_larger]


def smoke(setting: Setting, out: Path) -> list[str]:
    command = [str(ROOT / "bench" / "gpu_smoke.py"), str(out), *setting.recipe("cifar10_lowdim")]
    return command if setting.dry else [*command, *RESNET18, "-s", "train.epochs=1", "-s", "data.fraction=0.2"]


def tests(setting: Setting, out: Path) -> list[str]:
    patterns = TESTS_DRY if setting.dry else TESTS
    files = [str(path) for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
    return [str(ROOT / "bench" / "gpu_tests.py"), str(out), "-q", "-p", "no:cacheprovider", *files]


def augment(side_px: int) -> Words:
    """The dry run has no GPU to give to the peers, and no kornia may be there."""

    def words(setting: Setting, out: Path) -> list[str]:
        script = [str(ROOT / "bench" / "augment.py"), "--resume", "--out", str(out)]
        if setting.dry:
            tiny = ["--quick", "--sides", "16", "--no-blur", "--threads", "1", "--seconds", "0.05"]
            return [*script, *tiny, "--devices", "cpu", "--peers", "fastssl-torch", "torchvision-v2-batch"]
        return [*script, "--devices", "cuda", "--sides", str(side_px), "--seconds", "1", "--peers", *CUDA_PEERS]

    return words


def bench(verb: str, setting: Setting, out: Path, name: str, *more: str) -> list[str]:
    seconds = "0.1" if setting.dry else "15"
    return ["-m", "fastssl", "bench", verb, *setting.recipe(name), "--seconds", seconds, "--out", str(out), *more]


def machine(setting: Setting, out: Path) -> list[str]:
    return bench("machine", setting, out, "cifar10_lowdim")


def loader(setting: Setting, out: Path) -> list[str]:
    return bench("loader", setting, out, "cifar10_lowdim", *(["--only", "resident"] if setting.dry else []))


def step(backbone: str) -> Words:
    """The dry run's views are cut by the interpreted Triton kernels, where they can be."""

    def words(setting: Setting, out: Path) -> list[str]:
        if setting.dry:
            few = ["--only", "fixed", "--only", "trained"]
            backend = "cuda" if interprets() else "torch"
            return bench("step", setting, out, "", "-s", f"augment.backend={backend}", "-s", "data.batch_size=4", *few)
        return bench("step", setting, out, "cifar10_lowdim", "-s", f"model.backbone={backbone}")

    return words


VIT = "timm/vit_small_patch16_224"


def photographs(setting: Setting, out: Path) -> list[str]:
    script = str(ROOT / "bench" / "gpu_photographs.py")
    return [script, str(out), "24" if setting.dry else "4000", PHOTOGRAPHS]


def on_photographs(name: str, title: str, words: Words, *, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, title, words, 0.5, 3, needs, file=PHOTOGRAPHS)


def with_photographs(setting: Setting) -> list[str]:
    """Two views of 224 px of 256 images, none of them held out."""
    paths = [f"data.path={PHOTOGRAPHS}", "data.test_path=null", "data.val_count=0"]
    size = ["augment.side_px=8"] if setting.dry else ["augment.views=2", "data.batch_size=256"]
    return [word for change in [*paths, *size] for word in ("-s", change)]


def loader_224(setting: Setting, out: Path) -> list[str]:
    few = ["--only", "resident"] if setting.dry else []
    return bench("loader", setting, out, "imagenet100_lowdim", *with_photographs(setting), *few)


def step_224(backbone: str) -> Words:
    def words(setting: Setting, out: Path) -> list[str]:
        network = ["-s", f"model.backbone={backbone}", "-s", "model.projector=[2048, 512]"]
        chosen = ["--only", "fixed"] if setting.dry else network
        return bench("step", setting, out, "imagenet100_lowdim", *with_photographs(setting), *chosen)

    return words


def peers(setting: Setting, out: Path) -> list[str]:
    script = [str(ROOT / "bench" / "tta_peers.py"), *setting.recipe(str(ROOT / "bench" / "peers" / "small.yaml"))]
    if setting.dry:
        tiny = ["-s", "train.epochs=2", "--target", "1", "--seeds", "1", "--every-steps", "2", "--fixed-s", "0"]
        return [*script, *tiny, "--workers", "0", "--peers", "fastssl", "plain torchvision", "--out", str(out)]
    network = [
        "model.batch_norm=joint",
        "model.backbone=resnet18",
        "model.stem=cifar",
        "model.width=1",
        "model.projector=[2048, 2048]",
    ]
    network += ["augment.side_px=32", "augment.all={hue: 0.0}", "train.epochs=200", "train.precision=bf16"]
    network += ["loss.redundancy_weight=auto", "optim.lr=0.001"]
    chosen = [word for change in network for word in ("-s", change)]
    limits = ["--target", "65", "--seeds", "1", "--every-steps", "175", "--budget-s", "75", "--fixed-s", "0"]
    return [*script, *chosen, *limits, "--resume", "--out", str(out)]


def tta(backbone: str, *, seeds: int) -> Words:
    """The baseline recipe and the low-dimensional one, over at most 30 of their 100 epochs; finished runs are kept."""

    def words(setting: Setting, out: Path) -> list[str]:
        command = side_by_side(setting, out, f"tta-{backbone}", "cifar10_baseline", "cifar10_lowdim")
        command += ["--stop-at-target"]
        if setting.dry:
            return [*command, "--target", "knn=1", "--seeds", "2"]
        chosen = ["-s", f"model.backbone={backbone}", "-s", "evaluate.every_epochs=1", "-s", "train.epochs=30"]
        return [*command, *chosen, "--target", "knn=70,ridge=72", "--seeds", str(seeds)]

    return words


def resnet50(setting: Setting, out: Path) -> list[str]:
    """As shipped, but for the images held out of the authors' too. Half of the limit is for compiling and probes."""
    names = ("cifar10_baseline", "cifar10_lowdim", "cifar10_lowdim_muon", "cifar10_authors")
    command = side_by_side(setting, out, "resnet50", *names)
    command += ["--seeds", "1", "--budget-s", f"{60 * setting.limit_min / (2 * len(names)):.0f}"]
    if setting.dry:
        return [*command, "--target", "knn=1"]
    return [*command, "-s", "data.val_count=5000", "-s", "evaluate.every_epochs=1", "--target", "knn=40,ridge=45"]


def epoch(setting: Setting, out: Path) -> list[str]:
    script = [str(ROOT / "bench" / "epoch.py"), str(out), "cifar10_lowdim", *setting.changes()]
    return [*script, "--runs", str(setting.out / "epoch"), "--limit-min", f"{0.9 * setting.limit_min:.1f}"]


def side_by_side(setting: Setting, out: Path, folder: str, *names: str) -> list[str]:
    """Recipes in `bench tta`, their runs in a folder of --out; the tiny one alone in a dry run."""
    recipes = [setting.recipe(name)[0] for name in names]
    command = ["-m", "fastssl", "bench", "tta", *dict.fromkeys(recipes), *setting.recipe(names[0])[1:]]
    return [*command, "--out", str(out), "--run-dir", str(setting.out / folder)]


def claims(*, full: bool) -> Words:
    """At full size the recipe's ResNet-50 over its 100 epochs; else ResNet-18 over 10, so that a cell takes minutes."""

    def words(setting: Setting, out: Path) -> list[str]:
        recipe, changes = setting.recipe("cifar10_lowdim")[0], setting.recipe("cifar10_lowdim")[1:]
        command = [str(ROOT / "bench" / "claims.py"), recipe, *changes, "--json", str(out)]
        command += ["--out", str(setting.out / f"{out.stem}-runs"), "--figures", str(setting.out)]
        if setting.dry:
            grid = ["--dims", "8", "16", "--views", "2", "--fractions", "1", "--dim", "8", "--seeds", "1"]
            return [*command, *grid, "--metric", "ridge_pct"]
        command += ["-s", "loss={name: barlow_twins}"]  # as in the records on a CPU
        short = [] if full else [*RESNET18, "-s", "train.epochs=10"]
        dims = ["--dims", "64", "256", "1024", "8192"]
        return [*command, *short, *dims, "--budget-min", str(0.8 * setting.limit_min)]

    return words
