"""Figures of real runs: ``make figures`` trains the runs, some minutes on two cores, and draws.

The runs stay in ``build/figures``; started again it continues where it was stopped. The pictures
go to ``docs/images/`` and are committed, for a build of the site has neither runs nor a browser.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from charts import THEMES, sweep_chart
from matplotlib import rc_context
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI, SVG_EXPORT_THEME, TerminalTheme
from rich.text import Text
from schematics import routed_block

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build/figures"
IMAGES = ROOT / "docs/images"
MODTRAIN = [sys.executable, "-m", "modtrain"]
DATA, RUNS = f"data.path={WORK / 'data/sotu'}", f"runs_dir={WORK / 'runs'}"
TEXT = "docs/figures/inspected.txt"
CAPACITIES = (0.0625, 0.125, 0.25)
PORT = 16_006


def train() -> None:
    """Train what the pictures show: a comparison, and a sweep over capacities."""
    short = "budget.flops=4e12", "eval.every=20", "log.every=2", "timed_rounds=4"
    swept = "model.capacity=" + ",".join(map(str, CAPACITIES))
    _run("prepare", "corpus=sotu", f"output={WORK / 'data/sotu'}")
    _run("compare", "experiment=quickstart", "name=quickstart", DATA, RUNS, *short)
    sweep = "name=capacities", "model=quickstart", "budget.flops=1e12", "batch.tokens=2048"
    rate = "optimizer.lr=4e-3", "eval.every=20", "eval.sequences=64"
    _run("train", "-m", *sweep, *rate, DATA, RUNS, swept)


def compare() -> None:
    """The picture that `modtrain compare` writes, in both themes."""
    from modtrain.cli.compose_verbs import compose_arms
    from modtrain.experiments.compare.comparison_report import draw

    arms = compose_arms(["experiment=quickstart", "name=quickstart", DATA, RUNS]).arms
    for mode, colours in THEMES.items():
        with rc_context(colours):
            draw(arms, IMAGES / f"compare-{mode}.png")
        _shrink(IMAGES / f"compare-{mode}.png")


def sweep() -> None:
    """Loss against forward FLOPs over the capacities of the sweep."""
    results = {}
    for capacity in CAPACITIES:
        folder = WORK / f"runs/capacities/model.capacity={capacity}"
        results[capacity] = json.loads((folder / "result.json").read_text())
    sweep_chart(results, IMAGES)


def readme() -> None:
    """The figure of README.md, which is also seen where no site is built."""
    routed_block().save(IMAGES, "routed-block")


def plan() -> None:
    """What `modtrain plan` prints, as a terminal shows it."""
    command = "plan", "model=mod_220m", "data.seq_len=2048", "model.vocab_size=32000"
    words = [*command, "batch.tokens=262144", "budget.flops=6e18"]
    size = {"COLUMNS": "76", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    printed = _run(*words, environment=size)
    themes = {"light": _light_terminal(), "dark": DIMMED_MONOKAI}
    for mode, theme in themes.items():
        console = Console(record=True, width=76, file=io.StringIO())
        console.print(Text(f"$ modtrain {' '.join(words)}"), soft_wrap=False)
        console.print(Text.from_ansi(printed.split("what counts as a FLOP")[0].rstrip()))
        svg = console.export_svg(title="modtrain plan", theme=theme)
        # The fonts are on another server, which a picture in a page may not ask.
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
        (IMAGES / f"plan-{mode}.svg").write_text(svg)


def _light_terminal() -> TerminalTheme:
    dark = SVG_EXPORT_THEME
    return TerminalTheme((246, 248, 250), (31, 35, 40), list(dark.ansi_colors._colors[:8]))


def inspect() -> None:
    """The page of `modtrain inspect`, as a browser shows it."""
    page = WORK / "inspect.html"
    _run("inspect", "run=quickstart/mod", RUNS, f"file={TEXT}", f"output={page}")

    def shoot(browser: Page, mode: str) -> None:
        browser.goto(page.as_uri(), wait_until="load")
        browser.screenshot(path=IMAGES / f"inspect-{mode}.png")

    _screens(shoot, 900, 1000)


def report() -> None:
    """The page of `modtrain report`, of a comparison that takes some minutes."""
    name, page = "report_page", WORK / "report"
    seeds = "seeds=[0,1]", "batch.tokens=2048", "optimizer.lr=4e-3", "log.every=2"
    arms = "name=" + name, 'arms={dense: ["model.pattern=dense"], mod: []}', "model=tiny"
    short = "budget.flops=1e11", "eval.every=4", "eval.sequences=64", "timed_rounds=0"
    _run("compare", *arms, *seeds, *short, DATA, RUNS)
    _run("report", f"runs=[{name}]", RUNS, f"output={page}")

    def shoot(browser: Page, mode: str) -> None:
        browser.goto((page / "index.html").as_uri(), wait_until="load")
        browser.wait_for_selector("html[data-drawn]", state="attached")
        browser.screenshot(path=IMAGES / f"report-{mode}.png")

    _screens(shoot, 1100, 1240)


def tensorboard() -> None:
    """TensorBoard on the comparison's runs."""
    with _tensorboard() as address:

        def shoot(browser: Page, mode: str) -> None:
            dark = str(mode == "dark").lower()
            shown = f"darkMode={dark}&smoothing=0"
            browser.goto(f"{address}/?{shown}#timeseries")
            browser.wait_for_selector("line-chart, .line-chart", timeout=120_000)
            # The panel hides half of the charts.
            browser.get_by_role("button", name="Settings").last.click()
            browser.wait_for_timeout(8_000)
            browser.screenshot(path=IMAGES / f"tensorboard-{mode}.png")

        _screens(shoot, 1200, 800)


@contextmanager
def _tensorboard() -> Iterator[str]:
    address = f"http://127.0.0.1:{PORT}"
    words = ["tensorboard.main", "--logdir", str(WORK / "runs/quickstart"), "--port", str(PORT)]
    server = subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def _screens(shoot: Callable[[Page, str], Any], width: int, height: int) -> None:
    """Call ``shoot`` with a page of this size in each colour scheme; what it wrote gets smaller."""
    chromium = shutil.which("chromium")
    with sync_playwright() as playwright:
        # Its sandbox does not start as root, and the pages are our own.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        before = {path: path.stat().st_mtime_ns for path in IMAGES.glob("*.png")}
        for mode in ("light", "dark"):
            size = {"width": width, "height": height}
            page = browser.new_page(viewport=size, color_scheme=mode, device_scale_factor=1.25)
            shoot(page, mode)
            page.close()
        browser.close()
    for path in IMAGES.glob("*.png"):
        if before.get(path) != path.stat().st_mtime_ns:
            _shrink(path)


def _shrink(path: Path) -> None:
    """Write a PNG anew with 96 colours, a third of its size."""
    with Image.open(path) as image:
        method = Image.Quantize.FASTOCTREE if image.mode == "RGBA" else None
        image.quantize(96, method=method).save(path, optimize=True)


def _run(*words: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*MODTRAIN, *words],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    matplotlib.use("svg")
    wanted = sys.argv[1:] or [
        "train",
        "compare",
        "sweep",
        "readme",
        "plan",
        "inspect",
        "report",
        "tensorboard",
    ]
    for name in wanted:
        print(name, flush=True)
        globals()[name]()
