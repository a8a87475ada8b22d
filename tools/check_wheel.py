"""Every verb of the installed `fastssl` in the current, empty folder, as a newcomer would: run by tools/check_wheel.sh.

Makes 48 photographs of mixed sizes and kinds. A step that needs an extra which is not installed must end with exit code
2 and two lines that name it. Ends with exit code 1 at the first step that does otherwise.
"""

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = (
    "device=cpu", "data.batch_size=16", "augment.side_px=16", "model.backbone=resnet_tiny", "model.width=0.25",
    "model.projector=[8,8]", "train.epochs=1", "train.precision=fp32", "evaluate.linear_epochs=2",
)  # fmt: skip
CHANGES = [word for change in SMALL for word in ("-s", change)]
SHAPES = [word for key in ("side_px=16", "count=96", "test_count=32", "val_count=16") for word in ("-s", f"data.{key}")]
STEPS: list[tuple[str, str, str]] = [  # what to run, the extra it needs, a module of that extra
    ("--version", "", ""),
    ("--show-completion bash", "", ""),
    ("doctor", "", ""),
    ("recipes", "", ""),
    ("recipe show quickstart", "", ""),
    ("recipe schema", "", ""),
    ("train quickstart SHAPES", "", ""),
    ("convert photos data/photos.beton --side-px 24", "", ""),
    ("recipe new data/photos.beton --out mine.yaml --minutes 0.01", "", ""),
    ("train mine.yaml --dry-run", "", ""),
    ("preview mine.yaml", "", ""),
    ("train mine.yaml CHANGES", "", ""),
    ("sweep mine.yaml --grid optim.lr=0.001,0.002 CHANGES", "", ""),
    ("eval runs/mine --linear-epochs 2", "", ""),
    ("runs", "", ""),
    ("embed runs/mine photos --out features.npy", "", ""),
    ("export runs/mine --to safetensors --out weights.safetensors", "", ""),
    ("export runs/mine --to huggingface --out folder", "", ""),
    ("export runs/mine --to torch-export --out graph.pt2", "", ""),
    ("bench step mine.yaml --seconds 0.1 --only trained CHANGES", "", ""),
    ("report runs/mine", "report", "matplotlib"),
    ("embed runs/mine photos --out features.parquet", "parquet", "pyarrow"),
    ("convert features.parquet data/table.beton", "parquet", "pyarrow"),
    ("export runs/mine --to onnx --out graph.onnx", "onnx", "onnxscript"),
    ("train mine.yaml --run-dir runs/timm CHANGES -s model.width=1 -s model.backbone=timm/resnet10t", "timm", "timm"),
    ("train mine.yaml --run-dir runs/ffcv -s data.loader=ffcv CHANGES", "ffcv", "ffcv"),
    ("train mine.yaml --run-dir runs/dali -s data.loader=dali CHANGES", "dali", "nvidia.dali"),
    ("train mine.yaml --run-dir runs/log -s log.tensorboard=true CHANGES", "+tensorboard", "tensorboard"),
    ("train mine.yaml --run-dir runs/wandb -s log.wandb=true CHANGES", "+wandb", "wandb"),
    ("train mine.yaml --run-dir runs/mlflow -s log.mlflow=true CHANGES", "+mlflow", "mlflow"),
]  # + before an extra: what is missing is a warning, and the run continues


def photographs(folder: Path) -> None:
    generator = np.random.default_rng(0)
    kinds = [("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "jpg"), ("L", "jpg"), ("RGB", "webp")]
    for number in range(48):
        mode, suffix = kinds[number % len(kinds)]
        height, width = generator.integers(20, 61, 2)
        place = folder / ("cats", "dogs")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(place / f"{number}.{suffix}")


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent
        return False


def expand(line: str) -> list[str]:
    words = line.replace("SHAPES", "SHAPES CHANGES").split()
    return [w for word in words for w in {"CHANGES": CHANGES, "SHAPES": SHAPES}.get(word, [word])]


def fault(line: str, extra: str, module: str) -> str | None:
    """Runs one step; what it did that it should not have, or None."""
    command = [str(Path(sys.executable).with_name("fastssl")), *expand(line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    absent = bool(extra) and not installed(module)
    named = f"fastssl-vision[{extra.lstrip('+')}]" in "".join(done.stderr.split("\n"))
    if done.returncode != (2 if absent and extra[0] != "+" else 0):
        return f"exit code {done.returncode}: {done.stderr[-1500:]}"
    if absent and not named:
        return f"does not name the extra {extra}: {done.stderr[-1500:]}"
    if absent and extra[0] != "+" and len(done.stderr[done.stderr.index("Error: ") :].splitlines()) != 2:
        return f"says it in other than two lines: {done.stderr[-1500:]}"
    return None


def main() -> None:
    photographs(Path("photos"))
    for line, extra, module in STEPS:
        if extra == "parquet" and line.startswith("convert") and not installed(module):
            Path("features.parquet").write_bytes(b"PAR1")
        began = time.monotonic()
        if wrong := fault(line, extra, module):
            sys.exit(f"fastssl {line}\n{wrong}")
        missing = f", without {extra.lstrip('+')}" if extra and not installed(module) else ""
        print(f"fastssl {line} ({time.monotonic() - began:.0f} s{missing})", flush=True)


if __name__ == "__main__":
    main()
