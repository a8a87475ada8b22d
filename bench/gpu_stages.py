"""The stages of bench/gpu_suite.py, the most telling first: what each runs on a GPU, and at tiny size without one."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
CUDA_PEERS = ["fastssl-cuda", "fastssl-torch", "dali", "torchvision-v2-batch", "kornia", "kornia-compiled", "copy"]
PHOTOGRAPHS = "data/photographs.beton"
LARGE: list[tuple[str, str, tuple[str, ...]]] = [
    ("resnet50-224", "resnet50", ()),
    ("vit_small-224", "timm/vit_small_patch16_224", ("timm",)),
]


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
            return [str(ROOT / "bench" / "gpu_dry.yaml"), *self.changes()]
        return [name, *self.changes(), "-s", "evaluate.linear_epochs=0"]

    def changes(self) -> list[str]:
        """The options that point a recipe at the suite's data, made by the first command that needs it."""
        folder = self.out / "data"
        places = [f"data.path={folder}/train.beton", f"data.test_path={folder}/test.beton"]
        source = [] if self.dry else [f"data.source={self.source}"]
        return [word for change in [*places, *source] for word in ("-s", change)]


@dataclass(frozen=True)
class Stage:
    """Attributes: words after `python` (they write the record to the path given), limits in minutes, packages it needs,
    and a file in --out that an earlier stage makes."""

    name: str
    title: str
    words: Callable[[Setting, Path], list[str]]
    least_min: float
    most_min: float
    needs: tuple[str, ...] = ()
    file: str = ""
    dry_environment: dict[str, str] = field(default_factory=lambda: dict(INTERPRETED))

    def missing(self, setting: Setting) -> str:
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed"
        return f"{self.file} is not there" if self.file and not (setting.out / self.file).exists() else ""


def stages(setting: Setting) -> list[Stage]:
    """All of them, in the order in which they run."""
    networks = ["resnet18"] if setting.dry else ["resnet18", "resnet50"]  # once is enough to see that it works
    larger = Stage("tta-resnet50", "the same with ResNet-50", tta("resnet50"), 1, 180)
    return [
        Stage("gpu-tests", "the tests that need a GPU", tests, 0.2, 20, ("pytest",)),
        Stage("augment", "augmentation beside its peers", augment, 1, 25),
        Stage("machine", "every stage of a step against the ceilings", machine, 0.2, 5),
        Stage("loader", "loaders side by side", loader, 0.2, 10),
        *(Stage(f"step-{name}", f"the step of {name}", step(name), 0.3, 10) for name in networks),
        Stage("photographs", "photographs to measure with at 224 px", make_photographs, 0.5, 10, ("sklearn",)),
        Stage("loader-224", "loaders side by side on photographs", loader_224, 0.5, 15, file=PHOTOGRAPHS),
        *(
            Stage(
                f"step-{name}",
                f"the step of {name} on photographs",
                step_224(backbone),
                0.5,
                10,
                needs,
                file=PHOTOGRAPHS,
            )
            for name, backbone, needs in ([] if setting.dry else LARGE)
        ),
        Stage("peers", "time to accuracy against lightly and a plain loop, ResNet-18", peers, 1, 45),
        Stage("tta", "time to accuracy, low-dimensional against the baseline, ResNet-18", tta("resnet18"), 1, 60),
        *([] if setting.dry else [larger]),
        Stage("claims", "the paper's claims at full size", claims, 1, 600, ("matplotlib",)),
    ]


def tests(setting: Setting, out: Path) -> list[str]:
    files = [
        "augment/test_cuda.py",
        "training/test_no_sync.py",
        "data/test_loaders.py",
        "build/test_all_sum.py",
        "training/test_loop.py",
    ]
    few = ["-k", "draws_are_the_same_bits or asks_for_no_number"] if setting.dry else []
    chosen = [str(ROOT / "tests" / name) for name in (files[:2] if setting.dry else files)]
    return [str(ROOT / "bench" / "gpu_tests.py"), str(out), "-q", "-p", "no:cacheprovider", *few, *chosen]


def augment(setting: Setting, out: Path) -> list[str]:
    script = [str(ROOT / "bench" / "augment.py"), "--out", str(out)]
    if setting.dry:
        tiny = ["--quick", "--sides", "16", "--no-blur", "--threads", "1", "--seconds", "0.05"]
        return [*script, *tiny, "--devices", "cpu", "--peers", "fastssl-torch"]
    return [*script, "--devices", "cuda", "--peers", *CUDA_PEERS]


def bench(verb: str, setting: Setting, out: Path, name: str, *more: str) -> list[str]:
    seconds = "0.1" if setting.dry else "60"
    return ["-m", "fastssl", "bench", verb, *setting.recipe(name), "--seconds", seconds, "--out", str(out), *more]


def machine(setting: Setting, out: Path) -> list[str]:
    return bench("machine", setting, out, "cifar10_lowdim")


def loader(setting: Setting, out: Path) -> list[str]:
    return bench("loader", setting, out, "cifar10_lowdim", *(["--only", "resident"] if setting.dry else []))


def step(backbone: str) -> Callable[[Setting, Path], list[str]]:
    """The dry run's views are cut by the interpreted Triton kernels."""

    def words(setting: Setting, out: Path) -> list[str]:
        if setting.dry:
            few = ["--only", "fixed", "--only", "trained"]
            return bench("step", setting, out, "", "-s", "augment.backend=cuda", "-s", "data.batch_size=4", *few)
        return bench("step", setting, out, "cifar10_lowdim", "-s", f"model.backbone={backbone}")

    return words


def make_photographs(setting: Setting, out: Path) -> list[str]:
    script = str(ROOT / "bench" / "gpu_photographs.py")
    return [script, str(out), "24" if setting.dry else "4000", str(setting.out / PHOTOGRAPHS)]


def on_photographs(setting: Setting) -> list[str]:
    """Two views of 224 px of 256 images, none of them held out."""
    places = [f"data.path={setting.out / PHOTOGRAPHS}", "data.test_path=null", "data.val_count=0"]
    size = ["augment.side_px=8"] if setting.dry else ["augment.views=2", "data.batch_size=256"]
    return [word for change in [*places, *size] for word in ("-s", change)]


def loader_224(setting: Setting, out: Path) -> list[str]:
    few = ["--only", "resident"] if setting.dry else []
    return bench("loader", setting, out, "imagenet100_lowdim", *on_photographs(setting), *few)


def step_224(backbone: str) -> Callable[[Setting, Path], list[str]]:
    def words(setting: Setting, out: Path) -> list[str]:
        network = ["-s", f"model.backbone={backbone}", "-s", "model.projector=[2048, 512]"]
        return bench("step", setting, out, "imagenet100_lowdim", *on_photographs(setting), *network)

    return words


def peers(setting: Setting, out: Path) -> list[str]:
    script = [str(ROOT / "bench" / "tta_peers.py"), *setting.recipe(str(ROOT / "bench" / "peers" / "small.yaml"))]
    if setting.dry:
        tiny = [
            "-s",
            "train.epochs=2",
            "--target",
            "1",
            "--seeds",
            "1",
            "--every-steps",
            "2",
            "--fixed-s",
            "0",
            "--workers",
            "0",
        ]
        return [*script, *tiny, "--peers", "fastssl", "plain torchvision", "--out", str(out)]
    network = ["model.backbone=resnet18", "model.stem=cifar", "model.width=1", "model.projector=[2048, 2048]"]
    network += ["augment.side_px=32", "augment.all={hue: 0.0}", "train.epochs=200", "train.precision=bf16"]
    network += ["loss.redundancy_weight=auto", "optim.lr=0.001"]
    chosen = [word for change in network for word in ("-s", change)]
    limits = ["--target", "75", "--seeds", "1", "--every-steps", "350", "--budget-s", "900"]
    return [*script, *chosen, *limits, "--out", str(out)]


def tta(backbone: str) -> Callable[[Setting, Path], list[str]]:
    """The baseline recipe and the low-dimensional one, to what the baseline reaches in a part of its epochs."""

    def words(setting: Setting, out: Path) -> list[str]:
        names = ["cifar10_lowdim"] if setting.dry else ["cifar10_baseline", "cifar10_lowdim"]
        recipes, changes = [setting.recipe(name)[0] for name in names], setting.recipe(names[0])[1:]
        command = ["-m", "fastssl", "bench", "tta", *recipes, *changes, "--out", str(out), "--stop-at-target"]
        command += ["--run-dir", str(setting.out / f"tta-{backbone}")]
        if setting.dry:
            return [*command, "--target", "knn=1", "--seeds", "2"]
        chosen = ["-s", f"model.backbone={backbone}", "-s", "evaluate.every_epochs=1"]
        return [*command, *chosen, "--target", "knn=75,ridge=78", "--seeds", "3"]

    return words


def claims(setting: Setting, out: Path) -> list[str]:
    recipe, changes = setting.recipe("cifar10_lowdim")[0], setting.recipe("cifar10_lowdim")[1:]
    command = [str(ROOT / "bench" / "claims.py"), recipe, *changes, "--json", str(out)]
    command += ["--out", str(setting.out / "claims"), "--figures", str(setting.out)]
    if setting.dry:
        grid = ["--dims", "8", "16", "--views", "2", "--fractions", "1", "--dim", "8", "--seeds", "1"]
        return [*command, *grid, "--metric", "ridge_pct"]
    return [*command, "--dims", "64", "256", "1024", "8192", "--budget-min", str(0.8 * setting.limit_min)]
