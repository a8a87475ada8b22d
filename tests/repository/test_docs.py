"""README and docs/: commands name what exists, tutorials and Python run, links lead somewhere, the site builds."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from fastssl.cli import app
from fastssl.recipe.load import load, shipped

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "sh", "bash", "console", "shell")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block."""
    found = re.finditer(r"^```([a-z]*)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    yield from ((match[1], match[2]) for match in found)


def commands(page: Path) -> list[list[str]]:
    """The words of each line of the shell blocks, comments and continuations taken out."""
    found = []
    for language, text in blocks(page):
        if language in SHELL:
            for line in text.replace("\\\n", " ").splitlines():
                found += [words for part in re.split(r" && | \| ", line) if (words := split(part))]
    return found


def split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that closes on another line
        return line.split()


def fastssl_words(words: list[str]) -> list[str] | None:
    """What follows `fastssl` or `-m fastssl`, whatever launches it."""
    for at, word in enumerate(words):
        if word in ("fastssl", ".venv/bin/fastssl") and (at == 0 or words[at - 1] == "-m" or words[0] in LAUNCHERS):
            return words[at + 1 :]
    return None


LAUNCHERS = ("torchrun", "srun", "python", "nohup", "env")


def parse(words: list[str]) -> dict[str, Any]:
    """What a verb's arguments and options say; an unknown verb, option or value fails."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        inner = command.commands.get(words[0]) or command.commands.get("machine")  # what `bench RECIPE` means
        assert inner is not None, f"fastssl has no verb {words[0]}"
        command, words = inner, words[words[0] in command.commands :]
    return command.make_context(command.name, list(words), resilient_parsing="--help" in words).params


def problem(words: list[str]) -> str | None:
    """Why a command could not be run as it stands, as far as it can be known without running it."""
    ours = fastssl_words(words)
    if ours is not None and ours[:1] != ["--install-completion"]:
        try:
            check_recipe(parse(ours))
        except Exception as error:  # of click, of the recipe, or of parse
            return getattr(error, "message", "") or str(error) or repr(error)
    if words[0] == "make" and not {word for word in words[1:] if "=" not in word} <= TARGETS:
        return f"the Makefile has no target {words[1:]}"
    if "pip" in words[0]:
        asked = {name for word in words for some in re.findall(r"\[([a-z0-9,-]+)\]", word) for name in some.split(",")}
        return None if asked <= EXTRAS else f"no extra {asked - EXTRAS}"
    script = next((word for word in words[:3] if re.match(r"(bench|tools)/.*\.(py|sh)$", word)), None)
    return script_problem(script, words) if script else None


def check_recipe(given: dict[str, Any]) -> None:
    """The recipe of a command, if it is shipped, with its changes and every value of its grid."""
    name = str(given.get("recipe"))
    if {Path(name).name, f"{name}.yaml"} & {path.name for path in shipped()}:
        load(name, given.get("changes") or ())
        for axis in given.get("grid") or ():
            key, _, values = axis.partition("=")
            for value in values.split(","):
                load(name, [f"{key}={value}"])


def script_problem(script: str, words: list[str]) -> str | None:
    path = ROOT / script
    if not path.exists():
        return f"there is no {script}"
    unknown = [w for w in words if w.startswith("--") and w != "--help" and w.partition("=")[0] not in path.read_text()]
    return f"{script} knows no {unknown}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_verbs_options_and_keys_that_exist(page: Path) -> None:
    found = {shlex.join(words): why for words in commands(page) if (why := problem(words))}
    assert not found


def test_a_renamed_verb_option_key_or_target_would_be_noticed() -> None:
    for line in (
        "fastssl pretrain quickstart",
        "fastssl train quickstart --epochs 3",
        "fastssl train quickstart -s optim.learning_rate=1",
        "fastssl sweep quickstart --grid optim.lr=0.1,fast",
        "fastssl export runs/x --to tensorflow --out x",
        "torchrun --nproc_per_node 2 -m fastssl train quickstart --resumed",
        "python bench/eigenspace.py --no-such-option",
        "make demonstration",
        "pip install 'fastssl-vision[everything]'",
    ):
        assert problem(shlex.split(line)), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_name_verbs_and_options_that_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"`fastssl ([^`]+)`", text):
        verb, *rest = line.split()
        assert verb in known or verb.startswith("--"), line
        if verb in known:
            inner = [known[verb], *getattr(known[verb], "commands", {}).values()]
            options = {option for command in inner for p in command.params for option in p.opts} | {"--help"}
            assert not [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options], line


def anchors(page: Path) -> set[str]:
    """Ids of the headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_pages_compiles_and_recipes_are_sound(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, page.name, "exec")
        if language in ("yaml", "yml") and "train:" in text and "data:" in text:
            load(yaml.safe_load(text))


SMALL = [
    *("device=cpu", "data.val_count=8", "data.batch_size=16", "augment.side_px=16", "model.backbone=resnet_tiny"),
    *("model.width=0.25", "model.projector=[8,8]", "train.epochs=1", "train.precision=fp32", "train.compile=false"),
    *("evaluate.linear_epochs=2", "evaluate.baselines=false"),
]
SHAPES = ["data.side_px=16", "data.count=160", "data.test_count=48"]
TINY = {  # what makes a command small enough for a test, by its first words; of options given twice the last counts
    "convert": ["--side-px", "16", "--force"],  # the workplace holds data/photos.beton already
    "eval": ["--linear-epochs", "2"],
    "report": ["--images", "40"],
    "recipe new": ["--minutes", "0.001"],
    "sweep": ["--seeds", "1"],
}
RUN_PAGES = ("README", "index", "quickstart", "own-images", "choosing", "data", "evaluation", "report", "use")
NOT_RUN = {  # what a command that is parsed alone has in it: which test does the same at another size, and why
    r"^(\S*fastssl )?doctor": "tests/bench/test_doctor.py: times every loader",
    r"^(\S*fastssl )?bench|bench/\w+\.py": "tests/bench/test_bench.py: times",
    "^torchrun": "tests/system/test_ranks.py: several processes",
    "--install-completion": "tests/cli/test_cli.py: would change the files of a person's shell",
    "cifar10": "tests/data/test_sources.py: downloads",
    "torchvision/|timm/": "tests/models/test_hub.py: large networks",
    "--probe finetune": "tests/pretrained/test_evaluation.py: a hundred steps at least",
    "log.tensorboard": "tests/training/test_trackers.py: an extra",
    r"pip install|-m venv|activate|^git |^cd ": "tests/system/test_package.py: sets up a machine",
    r"^tar ": "tests/repository/test_pack_gpu_suite.py: unpacks the archive that it has packed",
    "^docker": "tests/repository/test_tools.py: needs a daemon",
    "^sbatch": "tests/system/test_slurm.py: needs a cluster",
    r"^make |-m pytest|pre-commit": "tests/repository/test_repository.py: what runs the tests runs these",
}


def excuse(words: list[str]) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, " ".join(words))), None)


def run_page(page: Path, *, shapes: bool) -> list[str]:
    """Runs the `fastssl` lines of a page in order, in this process and folder, each at tiny size; the verbs run."""
    ran = []
    for words in commands(page):
        ours = fastssl_words(words)
        if ours and not excuse(words):
            changes = [*SMALL, *(SHAPES if shapes and "quickstart" in ours else [])]
            given = {word.partition("=")[0] for word in ours}
            takes = ours[0] in ("train", "preview", "sweep")
            named = [change for change in changes if takes and change.partition("=")[0] not in given]
            small = [word for change in named for word in ("-s", change)]
            small += [] if "--max-side-px" in ours else TINY.get(ours[0], TINY.get(" ".join(ours[:2]), []))
            typer.main.get_command(app).main([*ours, *small], prog_name="fastssl", standalone_mode=False)
            ran.append(ours[0])
    return ran


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_or_says_which_test_does_the_same(page: Path) -> None:
    silent = [words for words in commands(page) if not excuse(words)]
    assert not silent or page.stem in RUN_PAGES
    assert not [words for words in silent if fastssl_words(words) is None]


def test_the_excuses_name_tests_that_exist_and_commands_that_are_written() -> None:
    lines = [" ".join(words) for page in PAGES for words in commands(page)]
    for pattern, why in NOT_RUN.items():
        assert (ROOT / why.partition(":")[0]).is_file(), why
        assert any(re.search(pattern, line) for line in lines), pattern


def python_of(page: Path, name: str) -> str:
    found = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found, name
    return found[1]


def test_the_quick_start_runs_from_beginning_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "quickstart.md"
    ran = run_page(page, shapes=True)
    assert ran == ["recipes", "train", "preview", "train", "train", "runs", "eval", "report", "embed", "export"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"quickstart", "two-views"}
    assert (tmp_path / "report" / "index.html").exists()
    assert np.load("features.npy").shape[0] == 200
    names: dict[str, Any] = {}
    exec(python_of(page, "quickstart"), names)
    assert names["backbone"].embed(names["images"]).shape == np.load("features.npy")[:3].shape


def photographs(folder: Path) -> None:
    """Two classes of 24 images of mixed sizes and kinds."""
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            sides = (int(generator.integers(16, 40)), int(generator.integers(16, 40)), 3)
            image = Image.fromarray(generator.integers(0, 256, sides, np.uint8))
            image.save(folder / name / f"{i}.{'png' if i % 2 else 'jpg'}")


def test_own_images_run_from_beginning_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "my_photos")
    page = ROOT / "docs" / "own-images.md"
    recipe = re.search(r"<!-- recipe: photos -->\n```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert recipe
    (tmp_path / "photos.yaml").write_text(recipe[1])
    ran = run_page(page, shapes=False)
    assert ran == ["convert", "recipe", "train", "train", "train", "preview", "train"]
    assert (tmp_path / "runs" / "mine" / "summary.json").exists()
    assert (tmp_path / "runs" / "photos" / "summary.json").exists()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if find_spec("mkdocstrings") is None or find_spec("material") is None:
        pytest.skip("the site's tools are not installed (pip install 'fastssl-vision[docs]')")
    # With --quiet, --strict counts no warning.
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "troubleshooting.html").read_text(encoding="utf-8")
    assert "There is no export to &lt;to&gt;." in page
    assert "redundancy_rule" in (tmp_path / "api.html").read_text(encoding="utf-8")
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f'"{page.stem}.html"' not in front]


def test_every_user_error_of_the_code_is_in_the_list() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import docs_hooks
    finally:
        sys.path.remove(str(ROOT / "tools"))
    listed = docs_hooks.errors_by_topic()
    raised = sum(path.read_text().count("raise UserError(") for path in (ROOT / "fastssl").rglob("*.py"))
    assert len(list(docs_hooks.user_errors(ROOT / "fastssl"))) >= raised > 100
    assert "model.weights &lt;weights&gt; does not exist." in listed


def test_no_module_imports_what_only_one_system_has() -> None:
    alone = re.compile(r"^(?:import|from) (fcntl|msvcrt|resource|pwd|grp|termios|winreg|ffcv|nvidia)\b", re.MULTILINE)
    found = {p.name: alone.findall(p.read_text()) for p in (ROOT / "fastssl").rglob("*.py")}
    assert not {name: packages for name, packages in found.items() if packages}


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished_run: Path, tiny_data: tuple[Path, Path]
) -> Path:
    """A folder with what the guides' commands name: photographs, files, two runs, weights, a benchmark record."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_photos", "test_photos", "photos"):
        photographs(tmp_path / name)
    for name in ("quickstart", "NAME"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    for path, name in zip(tiny_data, ("pets-train.beton", "pets-test.beton"), strict=True):
        shutil.copy(path, name)
        shutil.copy(f"{path}.json", f"{name}.json")
    shutil.copy(finished_run / "recipe.yaml", "recipe.yaml")
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    export = ["export", "runs/NAME", "--to", "safetensors", "--out", "weights.safetensors"]
    typer.main.get_command(app).main(export, prog_name="fastssl", standalone_mode=False)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in RUN_PAGES if name not in ("quickstart", "own-images")])
def test_the_commands_of_the_guides_run(name: str, workplace: Path) -> None:
    if name == "report":
        pytest.importorskip("matplotlib")
    (page,) = [page for page in PAGES if page.stem == name]
    if name == "index":  # trains it
        shutil.rmtree("runs/quickstart")
    assert run_page(page, shapes=True)


def test_python_of_the_readme_and_of_evaluation_runs(workplace: Path) -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "evaluation.md"):
        names: dict[str, Any] = {"images": np.zeros((2, 16, 16, 3), np.uint8)}
        code = next(text for language, text in blocks(page) if language == "python")
        for long, short in (
            ("side_px=64", "side_px=16"),
            ('"side_px": 64', '"side_px": 16'),
            ('"epochs": 20', '"epochs": 1'),
        ):
            code = code.replace(long, short)
        exec(code.replace('"photos.beton"}', '"photos.beton", "batch_size": 16}'), names)
        assert names["record"]["rows"] if "record" in names else names["features"].shape == (2, 512)
