"""The command: instant help, two-line errors with exit code 2 and nothing written, one JSON record as the last line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import command
import pytest
import yaml

VERBS = (
    "convert",
    "doctor",
    "train",
    "preview",
    "recipes",
    "bench",
    "runs",
    "eval",
    "report",
    "sweep",
    "embed",
    "duplicates",
    "export",
    "recipe",
)
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fastssl_command(tmp_path: Path) -> Command:
    """Runs `fastssl ...` in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    return partial(command.fastssl, cwd=work)


def write_recipe(folder: Path, **sections: object) -> str:
    recipe = {
        "device": "cpu",
        "data": {"source": "shapes", "path": "shapes.beton", "side_px": 16, "count": 64, "batch_size": 16},
        "augment": {"side_px": 16},
        "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.25, "projector": [8]},
        "train": {"epochs": 1},
    }
    for name, value in sections.items():
        before = recipe.get(name)
        recipe[name] = before | value if isinstance(before, dict) and isinstance(value, dict) else value  # type: ignore[operator]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.mark.parametrize("words", [[], *[[verb] for verb in VERBS]], ids=lambda words: " ".join(words) or "fastssl")
def test_help_never_imports_torch(words: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['fastssl', *sys.argv[1:], '--help']\n"
        "from fastssl.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'numba', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def two_lines(done: subprocess.CompletedProcess[str], named: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("Converting ")]
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("Error: ")
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def evil_archive(folder: Path) -> str:
    from PIL import Image

    path, image = folder / "evil.tar", io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(image, "PNG")
    with tarfile.open(path, "w") as archive:
        for name in ("train/a/0.png", "../outside.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image.getvalue())
            archive.addfile(info, io.BytesIO(image.getvalue()))
    return str(path)


def one_image(folder: Path) -> str:
    from PIL import Image

    images = folder / "one"
    images.mkdir()
    Image.new("RGB", (16, 16), "red").save(images / "a.png")
    return str(images)


def empty(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def not_yaml(folder: Path) -> str:
    (folder / "recipe.yaml").write_text("data: [unclosed")
    return str(folder / "recipe.yaml")


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing recipe": (lambda d: ["train", "absent.yaml"], "absent.yaml"),
    "missing data": (
        lambda d: ["train", write_recipe(d, data={"source": None, "path": "absent.beton"})],
        "absent.beton",
    ),
    "missing source": (lambda d: ["convert", str(d / "absent"), "out.beton"], "absent"),
    "unknown key": (lambda d: ["train", write_recipe(d, data={"batchsize": 3})], "batch_size"),
    "wrong type": (lambda d: ["train", write_recipe(d, train={"epochs": "many"})], "train.epochs"),
    "empty folder": (lambda d: ["convert", empty(d), "out.beton"], "empty"),
    "one image": (
        lambda d: [
            "train",
            write_recipe(d, data={"source": one_image(d), "path": str(d / "one.beton"), "count": None}),
        ],
        "batch_size",
    ),
    "batch larger than the set": (
        lambda d: ["train", write_recipe(d, data={"batch_size": 65, "path": str(d / "s.beton")})],
        "batch_size 65",
    ),
    "one view": (lambda d: ["train", write_recipe(d, augment={"views": 1})], "augment.views"),
    "no dimensions": (lambda d: ["train", write_recipe(d, model={"projector": [0]})], "model.projector"),
    "no cuda": (lambda d: ["train", write_recipe(d, device="cuda")], "cuda"),
    "archive leaves its folder": (lambda d: ["convert", evil_archive(d), "out.beton"], "../outside.png"),
    "not YAML": (lambda d: ["train", not_yaml(d)], "not YAML"),
    "changes of no recipe": (lambda d: ["doctor", "-s", "seed=1"], "-s changes a recipe"),
    "not an override": (lambda d: ["train", write_recipe(d), "-s", "seed"], "-s"),
    "an unknown backbone": (
        lambda d: ["train", write_recipe(d, model={"backbone": "resnet19"}, data={"path": str(d / "s.beton")})],
        "model.backbone",
    ),
    "a preview that is no picture": (lambda d: ["preview", write_recipe(d), "--out", "a.txt"], ".png"),
    "a result over a folder": (
        lambda d: ["bench", "step", write_recipe(d), "--out", empty(d)],
        "--out",
    ),
    "no such variant": (
        lambda d: ["bench", "loader", write_recipe(d, data={"path": str(d / "s.beton")}), "--only", "zzz"],
        "zzz",
    ),
    "no download": (
        lambda d: ["convert", "cifar10", "out.beton", "--no-download", "--root", str(d / "nothing")],
        "cifar-10",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_two_lines_and_write_nothing(mistake: str, fastssl_command: Command, tmp_path: Path) -> None:
    if mistake == "no cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
    words, named = MISTAKES[mistake]
    two_lines(fastssl_command(*words(tmp_path)), named)
    assert not list((tmp_path / "work").iterdir())
    assert not (tmp_path / "outside.png").exists()


def test_a_download_without_network_ends_in_two_lines(fastssl_command: Command, tmp_path: Path) -> None:
    blocked = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    root = tmp_path / "root"
    done = fastssl_command("convert", "cifar10", "out.beton", "--root", str(root), env=blocked)
    two_lines(done, "cifar-10-python.tar.gz")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(("options", "named"), [("size=64k", "0.1 MB free"), ("size=8m,nr_inodes=1", "out.beton")])
def test_a_full_disk_ends_in_two_lines(options: str, named: str, fastssl_command: Command, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        done = fastssl_command("convert", "shapes", str(small / "out.beton"), "--count", "500")
        two_lines(done, named)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_a_conversion_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "fastssl", "convert", "shapes", str(out / "a.beton"), "--count", "50000"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and any(out.iterdir())) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not out.exists()


def test_a_traceback_is_there_when_asked_for(fastssl_command: Command) -> None:
    done = fastssl_command("train", "absent.yaml", env={"FASTSSL_TRACEBACK": "1"})
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "koi8-r"])
def test_output_comes_out_whatever_the_encoding_of_stdout(encoding: str, fastssl_command: Command) -> None:
    done = fastssl_command("recipe", "show", "quickstart", env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0
    code = "import sys; from fastssl.cli import main; sys.argv = ['fastssl', '--version']\n"
    code += r"""try: main()
except SystemExit: print("81.2 \u00b1 1.5 \u2588 caf\udce9")"""
    env = os.environ | {"PYTHONIOENCODING": encoding}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True).stdout
    assert printed.splitlines()[-1].endswith(b"caf\xe9")  # a name that is no UTF-8, byte for byte


def test_convert_then_train_with_json_records_last(fastssl_command: Command, tmp_path: Path) -> None:
    done = fastssl_command("convert", "shapes", "a.beton", "--count", "64", "--side-px", "16", "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert manifest["count"] == 64
    assert manifest["side_px"] == 16
    recipe = write_recipe(tmp_path, data={"source": None, "path": "a.beton"})
    done = fastssl_command("train", recipe, "--run-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 4
    assert "Traceback" not in done.stderr


def test_convert_takes_the_classes_of_an_earlier_file(fastssl_command: Command, tmp_path: Path) -> None:
    from PIL import Image

    for folder, names in (("a", "xyz"), ("b", "xz")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(tmp_path / folder / name / "0.png")
    assert fastssl_command("convert", str(tmp_path / "a"), "a.beton").returncode == 0
    done = fastssl_command("convert", str(tmp_path / "b"), "b.beton", "--classes", "a.beton.json", "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert (manifest["classes"], manifest["class_counts"]) == (["x", "y", "z"], [1, 0, 1])
    two_lines(
        fastssl_command("convert", str(tmp_path / "a"), "c.beton", "--classes", "x,z"), "not in the given list: y"
    )


def test_dry_run_prints_shapes_and_steps_and_writes_nothing(fastssl_command: Command, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, data={"count": 64})
    done = fastssl_command("train", recipe, "--dry-run", "-s", "augment.views=3", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["images"], record["steps_per_epoch"], record["views"], record["embedding_dim"]) == (64, 4, 3, 8)
    assert record["estimated_train_s"] > 0
    assert 0 < record["projector_pct"] < 100
    assert record["recipe"]["augment"]["views"] == 3
    assert not list((tmp_path / "work").iterdir())


def test_recipes_are_listed_with_their_headers(fastssl_command: Command) -> None:
    done = fastssl_command("recipes")
    assert done.returncode == 0
    assert "quickstart.yaml" in done.stdout
    assert "Command:" in done.stdout


def test_a_schema_does_not_replace_a_recipe(fastssl_command: Command, tmp_path: Path) -> None:
    recipe = Path(write_recipe(tmp_path))
    before = recipe.read_text()
    two_lines(fastssl_command("recipe", "schema", "--out", str(recipe)), "suffix .json")
    assert recipe.read_text() == before


def test_the_shell_completes_verbs_and_options() -> None:
    installed = str(Path(sys.executable).with_name("fastssl"))
    for typed, wanted in (("fastssl tr", "train"), ("fastssl eval --pro", "--probe"), ("fastssl recipe sc", "schema")):
        given = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_FASTSSL_COMPLETE": "complete_bash"}
        done = subprocess.run([installed], capture_output=True, text=True, timeout=60, env={**os.environ, **given})
        assert done.stdout.split() == [wanted]


def test_the_version_and_the_verbs_in_order_of_use(fastssl_command: Command) -> None:
    import fastssl
    from fastssl.cli.app import WORKFLOW

    assert fastssl_command("--version").stdout == f"fastssl {fastssl.__version__}\n"
    assert {*WORKFLOW} == {*VERBS}
    shown = fastssl_command("--help").stdout
    assert shown.index(" doctor ") < shown.index(" convert ") < shown.index(" train ") < shown.index(" export ")


def test_what_is_pasted_is_neither_broken_nor_taken_for_a_style(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastssl.cli.bench_tables import rendered
    from fastssl.cli.tables import doctor_text
    from fastssl.training.progress import console as stderr

    fix = "pip install 'fastssl-vision[parquet]'"
    stderr.print(f"Warning: {fix}", soft_wrap=True)
    assert fix in capsys.readouterr().err
    monkeypatch.setenv("COLUMNS", "30")
    checks = [{"kind": "format", "name": "Parquet", "works": False, "detail": "absent", "fix": fix}]
    assert fix in doctor_text({"checks": checks, "stages": [], "note": fix})
    assert fix in rendered(f"Left out: kornia is not installed: {fix}")


def test_the_end_of_a_run_tells_its_accuracies_with_and_without_a_test_set() -> None:
    from fastssl.cli.progress import summary_text
    from fastssl.training.progress import evaluation_text

    summary = {"name": "a", "views": 8, "train_s": 2.0, "views_per_s": 4.0, "run_dir": "runs/a"}
    held_out = {"epoch": 2.0, "loss": 3.5, "invariance": 1.5, "redundancy": 20.0, "train_s": 2.0}
    held_out |= {"knn5_pct": 61.0, "knn20_pct": 60.0, "knn20_used": 8.0, "ridge_pct": 62.0, "val_images": 50.0}
    held_out |= {"rankme": 7.25, "invariance_residual": 0.25, "dims": 32.0, "spectrum_images": 200.0}
    assert evaluation_text(held_out) == (
        "epoch 2: kNN (k = 5) 61.0 %, kNN (k = 8) 60.0 %, ridge 62.0 % (n = 50); "
        "RankMe (centered) 7.2, invariance residual 0.250 (32 dimensions, n = 200); 2 s of training"
    )
    best = {"step": 1, "epoch": 1.0, "knn5_pct": 63.0}
    printed = [
        " ".join(line.split()) for line in summary_text({**summary, "validation": held_out, "best": best}).splitlines()
    ]
    assert "loss 3.5 (invariance 1.5, redundancy 20)" in printed
    assert "RankMe (centered) 7.2, invariance residual 0.250 (32 dimensions, n = 200)" in printed
    assert any(re.fullmatch(r"kNN \(k = 5\) on held-out images \(n = 50\) 61.0 ± 1\d\.\d %", line) for line in printed)
    assert "best kNN (k = 5), epoch 1 63.0 %" in printed
    tested = {**summary, "validation": held_out, "test_knn5_pct": 50.0, "raw_pixel_knn5_pct": 30.0, "best": best}
    printed = [" ".join(line.split()) for line in summary_text(tested).splitlines()]
    assert printed[-3:-1] == ["kNN (k = 5) on test 50.0 %", "kNN (k = 5) of raw pixels 30.0 %"]
    assert "held-out" not in summary_text({**summary, "validation": {}})
