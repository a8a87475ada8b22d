"""The report in a real browser: a silent console, every figure drawn, light and dark, nothing wider than a phone."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
PHONE_PX = 390
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Runs in a copy of the page whose policy is lifted; the page itself holds no script.
MEASURE = """
addEventListener('load', () => {
  const cards = [...document.querySelectorAll('figure.card')].map(card => ({
    name: card.id,
    drawn: [...card.querySelectorAll('svg.chart, img')].map(e => e.tagName === 'IMG'
      ? (e.complete && e.naturalWidth > 0 && e.getBoundingClientRect().width > 20)
      : (e.getBBox().width > 50 && e.querySelectorAll('path').length > 5)),
  }));
  const page = document.scrollingElement;
  const found = {cards, width: innerWidth, needs: page.scrollWidth};
  parent.postMessage(JSON.stringify(found), '*');
});
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run and of a time to accuracy."""
    from fastssl.report import report

    folder = tmp_path_factory.mktemp("browser")
    work = {"target": "knn20_pct", "pct": 80.0}
    row = {"impl": "a", "work": work, "metric": "train_s", "median": 2.0, "min": 1.0, "max": 3.0, "n": 3, "seeds": 3}
    (folder / "tta.json").write_text(json.dumps({"bench": "tta", "rows": [row, row | {"impl": "b", "median": 9.0}]}))
    return Path(report([finished_run, folder / "tta.json"], folder / "out", images=60)["page"])


def chromium(browser: str, page: Path, *options: str) -> tuple[str, list[str]]:
    """What it prints, and the lines of its console."""
    profile = page.parent / "profile"
    always = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    quiet = ("--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}")
    command = [browser, *always, *quiet, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def measured(browser: str, page: Path, *, width_px: int) -> dict[str, Any]:
    """What the page is like in a frame of this width (a headless window is never narrower than 500 px)."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.with_name("inner.html").write_text(text.replace("</body>", f"<script>{MEASURE}</script></body>"))
    outer = page.with_name("outer.html")
    listen = "addEventListener('message', e => { document.getElementById('found').textContent = e.data; });"
    frame = f'<iframe src="inner.html" width="{width_px}" height="844" style="border:0"></iframe>'
    outer.write_text(f'<!doctype html><pre id="found"></pre><script>{listen}</script>{frame}')
    printed, console = chromium(browser, outer, "--dump-dom", "--virtual-time-budget=5000")
    assert console == []
    result = re.search(r'<pre id="found">(.*?)</pre>', printed, re.DOTALL)
    assert result, printed[-500:]
    found: dict[str, Any] = json.loads(unescape(result.group(1)))
    return found


def test_every_figure_is_drawn_and_nothing_is_wider_than_a_phone(browser: str, page: Path) -> None:
    found = measured(browser, page, width_px=PHONE_PX)
    written = set(re.findall(r'<figure class="card[^"]*" id="([^"]+)">', page.read_text()))
    assert {card["name"] for card in found["cards"]} == written
    assert len(written) >= 12
    assert not [card["name"] for card in found["cards"] if not card["drawn"] or not all(card["drawn"])]
    assert found["width"] == PHONE_PX
    assert found["needs"] <= PHONE_PX, "the page scrolls sideways"


def test_light_and_dark_and_a_silent_console(browser: str, page: Path) -> None:
    """The page as it is, its policy in force: what it drew, in both color schemes."""
    from PIL import Image

    levels = []
    for scheme in (1, 0):  # blink's numbers: light, dark
        shot = page.with_name(f"shot{scheme}.png")
        options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1280,1600", f"--screenshot={shot}")
        _, console = chromium(browser, page, *options)
        assert console == []
        with Image.open(shot) as image:
            pixels = np.asarray(image.convert("L")).astype(float)
        assert len(np.unique(pixels[400:])) > 30, "charts are drawn"
        levels.append(float(np.median(pixels)))
    assert levels[0] > 230
    assert levels[1] < 40
