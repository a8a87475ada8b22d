"""The report: every figure of a run and of a record, self-contained; what is absent is said, damage is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.errors import UserError
from fastssl.report import bench, curves, inputs, pictures, report
from fastssl.training.loop import train

pytest.importorskip("matplotlib")
PAGE_FIGURES = (
    *("accuracy-test", "accuracy-epochs", "accuracy-views", "accuracy-time", "curve-loss", "time"),
    *("rankme", "participation_ratio", "orthogonality_residual", "invariance_residual"),
)
IMAGE_FIGURES = ("views", "neighbors", "spectrum", "map")


@pytest.fixture(scope="module")
def made(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report of one finished run."""
    out = tmp_path_factory.mktemp("report")
    assert report([finished_run], out, images=60)["skipped"] == []
    return out


def row(impl: str, work: dict[str, Any], metric: str, *values: float, **more: Any) -> dict[str, Any]:
    v = sorted(values)
    spread = {"median": v[len(v) // 2], "min": v[0], "max": v[-1]} if v else dict.fromkeys(("median", "min", "max"))
    return {"impl": impl, "work": work, "metric": metric, **spread, "n": len(v), "values": list(values), **more}


TARGET = {"target": "knn20_pct", "pct": 80.0}
TTA = {
    "bench": "tta",
    "rows": [
        row("lowdim", TARGET, "train_s", 100.0, 120.0, 90.0, seeds=3),
        row("baseline", TARGET, "train_s", 300.0, seeds=3, median=None),
        row("slow", TARGET, "train_s", seeds=3),
        row("lowdim", TARGET, "steps", 10.0, 12.0, 9.0, seeds=3),
        row("lowdim", {}, "time_to_linear_85_s", 200.0),
    ],
    "speed_ups": [
        {"recipe": "lowdim", "against": "baseline", "metric": "knn20_pct", "target_pct": 80.0, "bound": "at least"}
        | {"ratio": 3.0, "low": 2.5, "high": 3.3}
    ],
}
MACHINE = {
    "bench": "machine",
    "rows": [
        row("fastssl", {"stage": stage}, metric, *values)
        for stage in ("loader", "forward", "backward")
        for metric, values in (("images_per_s", (5e2, 6e2, 7e2)), ("share_pct", (30.0, 31.0, 33.0)))
    ],
}


def record(folder: Path, name: str, content: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def test_a_run_has_every_figure_on_the_page_and_beside_it(made: Path) -> None:
    page = (made / "index.html").read_text()
    cards = re.findall(r'<figure class="card[^"]*" id="([^"]+)">', page)
    for name in PAGE_FIGURES:
        assert name in cards
        assert (made / f"{name}.svg").exists()
    for name in IMAGE_FIGURES:
        assert any(card.endswith(f"-{name}") for card in cards), name
        assert [p for p in made.iterdir() if p.stem.endswith(f"-{name}")]


def test_the_page_needs_nothing_from_outside_and_runs_nothing(made: Path) -> None:
    page = (made / "index.html").read_text()
    namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert "http" not in namespaces.replace("http-equiv", "")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "$" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page), "matplotlib's mathematical markup"


def test_ids_are_unique_and_referred_to_inside_the_page(made: Path) -> None:
    page = (made / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_figures_are_whole_files(made: Path) -> None:
    from PIL import Image

    for path in made.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5, path.name
        assert "prefers-color-scheme:dark" in path.read_text()
    for path in made.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image).std() > 10, f"{path.name} is blank"


def test_the_main_figures_are_the_runs_own(made: Path, finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    tiles = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)<", (made / "index.html").read_text()))
    assert tiles["kNN (k = 5) on test"] == f"{summary['test_knn5_pct']:.1f}"
    assert tiles["linear probe on test"] == f"{summary['test_linear_pct']:.1f}"
    assert tiles["kNN (k = 5), held-out"] == f"{summary['validation']['knn5_pct']:.1f}"
    page = (made / "index.html").read_text()
    assert "n = 100" in page
    assert "n = 40; best" in page


def test_several_runs_share_axes_and_are_told_apart(finished_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    recipe = tmp_path / "runs" / "b" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("\nseed: 0", "\nseed: 5", 1).replace("<", ""))
    found, _ = inputs.read_inputs([tmp_path / "runs"])
    assert [run.label for run in found] == ["a", "b"]
    assert [run.group for run in found] == [0, 0], "seeds of one recipe"
    assert found[1].differences == {"seed": 5}
    report([tmp_path / "runs"], tmp_path / "out", images=30)
    page = (tmp_path / "out" / "index.html").read_text()
    assert ">seed 5</td>" in page
    assert page.count('id="curve-loss"') == 1
    assert "a + 1 other seed" in page


def test_runs_of_one_seed_are_no_other_seeds_and_two_losses_have_charts_of_their_own(
    finished_run: Path, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(finished_run, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = tmp_path / "runs" / "c" / "recipe.yaml"
    tree = yaml.safe_load(recipe.read_text()) | {"loss": {"name": "vicreg"}}
    recipe.write_text(yaml.safe_dump(tree))
    report([tmp_path / "runs"], tmp_path / "out", images=30)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "a + 1 more run" in page
    assert "other seed" not in page
    assert 'id="curve-loss-barlow_twins"' in page
    assert 'id="curve-loss-vicreg"' in page


def own_loss(z_VBD: torch.Tensor) -> dict[str, torch.Tensor]:
    spread = z_VBD.std(1).mean()
    return {"loss": (z_VBD - z_VBD.mean(0)).square().mean() - spread, "spread/<b>": spread}


def test_a_run_with_an_own_loss_is_no_barlow_twins(
    finished_run: Path, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe | {"evaluate": {"linear_epochs": 0, "knn_k": [5]}}
    done = tmp_path / "done"
    assert train(recipe, run_dir=done, loss=own_loss)["own_loss"] is True
    shutil.copytree(done, tmp_path / "interrupted", ignore=shutil.ignore_patterns("summary.json"))
    for name in ("done", "interrupted"):
        page = Path(report([tmp_path / name], tmp_path / f"page-{name}", images=16)["page"]).read_text()
        assert "own loss" in page
        assert "Barlow" not in page
        assert "Spread/&lt;b&gt;" in page
    found, _ = inputs.read_inputs([finished_run, done, tmp_path / "interrupted"])
    assert found[0].group != found[1].group == found[2].group
    assert [run.differences.get("loss") for run in found] == [None, "own loss", "own loss"]
    page = Path(report([finished_run, done], tmp_path / "both", images=16)["page"]).read_text()
    assert 'id="curve-loss-barlow_twins"' in page
    assert 'id="curve-loss-own"' in page


@pytest.mark.parametrize(
    ("curve", "shown"),
    [
        ([100.0, *(float(y) for y in range(20, 0, -1))], (18, 30)),  # one first step far above the rest
        ([float(y) for y in range(20, 0, -1)], None),
        ([100.0, 1.0, 1.0], None),  # too few to tell
        ([5.0] * 30, None),
        ([1.0] * 20 + [100.0], None),  # what comes late is shown
    ],
)
def test_an_axis_leaves_out_a_first_spike_and_nothing_else(
    curve: list[float], shown: tuple[float, float] | None
) -> None:
    top = curves.robust_top([curve])
    assert top is None if shown is None else shown[0] <= top <= shown[1]


def test_names_are_text_not_markup(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x<img src=y onerror=z>$a$"
    shutil.copytree(finished_run, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: tiny", "name: '<script>alert(1)</script> \\ $x_1$'", 1))
    report([folder, finished_run], tmp_path / "out", images=30)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page
    assert "<img src=y" not in page
    for path in (tmp_path / "out").glob("*.svg"):
        ElementTree.parse(path)


def test_absent_or_changed_data_is_said_and_skipped(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(finished_run, folder)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("train.beton", "gone.beton").replace("test.beton", "gone.beton"))
    made = report([folder], tmp_path / "out")
    assert len(made["skipped"]) == 2
    assert all("gone.beton does not exist" in note for note in made["skipped"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "gone.beton does not exist" in page
    assert 'id="curve-loss"' in page
    (folder / "recipe.yaml").write_text(recipe)
    manifest = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(manifest | {"digest": "sha256:other"}))
    assert "no longer the file" in report([folder], tmp_path / "out", images=30)["skipped"][0]


def test_a_run_without_checkpoints_or_steps_is_said(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "checkpoints")
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).unlink()
    said = " ".join(report([folder], tmp_path / "out")["skipped"])
    assert "no step is logged yet" in said
    assert "holds no whole checkpoint" in said


def test_time_to_accuracy_has_bars_spread_and_what_was_not_reached(tmp_path: Path) -> None:
    made = report([record(tmp_path, "tta", TTA)], tmp_path / "out")
    assert [Path(f).name for f in made["files"]] == ["index.html", "tta-tta0.svg", "tta-tta1.svg"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Time to knn20 of 80 %" in page
    assert "Time to linear of 85 %" in page
    assert "lowdim is at least 3.00 times as fast as baseline (2.50 to 3.30 by bootstrap over seeds)." in page
    chart = (tmp_path / "out" / "tta-tta0.svg").read_text()
    assert chart.count("not reached") == 2
    assert "1 of 3 seeds" in chart
    assert "100 s" in chart


def test_records_of_one_file_name_have_figures_and_titles_of_their_own(tmp_path: Path) -> None:
    files = []
    for folder, seconds in (("old", 10.0), ("new", 20.0)):
        (tmp_path / folder).mkdir()
        rows = [row(impl, {}, "images_per_s", seconds) for impl in ("a", "b")]
        files.append(record(tmp_path / folder, "step", TTA | {"rows": rows}))
    made = report([*files, files[0]], tmp_path / "out")
    names = [Path(f).name for f in made["files"]]
    assert names == ["index.html", "old_step-metric0.svg", "new_step-metric0.svg"], "one section per file"
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("Benchmark: old/step<") == page.count("Benchmark: new/step<") == 1
    assert bench.slugs(["a/b", "a b", "c"]) == ["a_b-1", "a_b-2", "c"]


def test_stages_and_any_other_record(tmp_path: Path) -> None:
    own = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))
    assert own
    made = report([record(tmp_path, "machine", MACHINE), *own], tmp_path / "out")
    names = [Path(f).name for f in made["files"]]
    assert "machine-images_per_s.svg" in names
    assert "machine-share_pct.svg" in names
    page = (tmp_path / "out" / "index.html").read_text()
    for path in own:
        for one in json.loads(path.read_text())["rows"]:
            assert one["metric"] in page


@pytest.mark.parametrize(
    "content", [[], {}, {"bench": "x"}, {"rows": []}, {"bench": "x", "rows": [{}]}, {"bench": "x", "rows": [7]}, "x"]
)
def test_what_is_no_record_is_refused_and_nothing_written(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"x\.json is not a benchmark record"):
        report([record(tmp_path, "x", content)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


VALUES = st.sampled_from([None, True, "x", [], {}, -1, 0, 1e-300, 1e300, float("nan"), float("inf"), 10**400, "$\\x"])


@given(
    kind=st.sampled_from(["row", "work", "speed_ups", "about"]),
    key=st.sampled_from(["impl", "work", "metric", "median", "min", "max", "n", "values", "seeds", "target", "pct"]),
    other=st.sampled_from(["bench", "rows", "hardware", "versions", "commit", "command", "date", "speed_ups"]),
    value=VALUES,
)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_record_is_drawn_or_refused(tmp_path: Path, kind: str, key: str, other: str, value: Any) -> None:
    content = json.loads(json.dumps(TTA | {"rows": TTA["rows"][:2]}))
    place = {"row": content["rows"][0], "work": content["rows"][0]["work"], "speed_ups": content["speed_ups"][0]}
    place.get(kind, content)[other if kind == "about" else key] = value
    try:
        made = report([record(tmp_path, "x", content)], tmp_path / "out")
    except UserError:
        return
    assert Path(made["page"]).stat().st_size > 1000


@given(
    name=st.sampled_from(["data.json", "environment.json", "summary.json", "metrics.jsonl"]),
    pick=st.integers(0, 10**6),
    value=VALUES,
)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_run_is_drawn_left_out_or_refused(
    finished_run: Path, tmp_path: Path, name: str, pick: int, value: Any
) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    lines = (folder / name).read_text().splitlines() if name == "metrics.jsonl" else [(folder / name).read_text()]
    records = [json.loads(line) for line in lines]
    chosen = records[pick % len(records)]
    chosen[sorted(chosen)[pick % len(chosen)]] = value
    (folder / name).write_text("\n".join(json.dumps(one) for one in records) + "\n")
    try:
        made = report([folder], tmp_path / "out", images=20)
    except UserError as error:
        assert str(folder / name) in error.what  # noqa: PT017 - either outcome is allowed
        return
    assert Path(made["page"]).stat().st_size > 1000


def test_without_matplotlib_two_lines_name_the_extra(finished_run: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from fastssl.cli import main; main()"
    words = [sys.executable, "-c", code, "report", str(finished_run), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 2
    assert "fastssl-vision[report]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_neighbors_are_the_nearest_and_never_the_query() -> None:
    """Two tight groups far apart: every neighbor of a query is of its group."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[5.0, 0, 0], [-5.0, 0, 0]]).repeat_interleave(20, 0)
    labels_N = torch.tensor([0] * 20 + [1] * 20)
    unit_NF = pictures.unit_rows(centers + 0.1 * torch.randn(40, 3, generator=generator))
    nearest_NK = pictures.nearest(unit_NF)
    assert nearest_NK.shape == (40, pictures.NEIGHBORS)
    assert (nearest_NK != torch.arange(40)[:, None]).all()
    assert (labels_N[nearest_NK] == labels_N[:, None]).all()


def test_queries_take_turns_among_classes() -> None:
    queries = pictures.spread_queries(torch.tensor([0] * 50 + [1] * 50 + [2]))
    assert queries[:3] == [0, 50, 100]
    assert len(queries) == len(set(queries)) == pictures.QUERIES


def test_the_map_keeps_groups_apart_and_cells_single() -> None:
    rng = np.random.default_rng(0)
    x_NF = np.concatenate([rng.normal(c, 0.1, (30, 5)) for c in (-3, 3)]).astype(np.float32)
    xy_N2, how = pictures.projection(x_NF)
    assert how == "PCA", "too few points for neighbors' embedding"
    assert min(xy_N2[:30, 0].max(), xy_N2[30:, 0].max()) < max(xy_N2[:30, 0].min(), xy_N2[30:, 0].min())
    cells = pictures.grid_cells(xy_N2)
    assert len(cells) == len(set(cells.values())) > 10
    assert all(0 <= r < pictures.MAP_CELLS and 0 <= c < pictures.MAP_CELLS for r, c in cells)


def test_one_path_and_no_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inputs is 'runs', not a list"):
        report("runs", tmp_path)
    with pytest.raises(UserError, match="images is 0"):
        report(["runs"], tmp_path, images=0)


def test_a_report_does_not_depend_on_the_default_dtype(finished_run: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert report([finished_run], tmp_path)["skipped"] == []
    finally:
        torch.set_default_dtype(torch.float32)
