"""The page: against a parser, from the command line, and in a browser."""

import json
import re
from html.parser import HTMLParser
from itertools import product

import plotly.graph_objects as go
import pytest

from modtrain.cli import main as cli
from modtrain.cli.compose import compose
from modtrain.experiments.report import report as report_module
from modtrain.experiments.report.collect import collect
from modtrain.experiments.report.interactive.figures import interactive_figures
from modtrain.experiments.report.page import link
from modtrain.experiments.report.report import report
from modtrain.experiments.report.series import COLOURS, loss_range, pareto_front, short_names
from modtrain.inference.inspect.figures import luminance
from modtrain.training.run import train
from tests.experiments.report.report_cases import (
    report_of,
    write_comparison,
    write_grid,
    write_run,
    write_swaps,
)

NASTY = "a <b>&amp; \"x\" 'y' %{x} $z$ <script>alert(1)<"


class Parsed(HTMLParser):
    """Checks that tags nest, and keeps tags, their attributes, and text outside of scripts."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.scripts = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def undrawn(monkeypatch):
    """Where the files of figures do not matter: they take most of the time."""
    monkeypatch.setattr(report_module, "write_figures", lambda *_: [])


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    return root


def page_of(config):
    report(config)
    return Parsed((report_module.Path(config.output) / "index.html").read_text(encoding="utf-8"))


def full(root):
    """Runs that need every section of the page."""
    for arm, loss in (("dense", 3.0), ("mod", 2.9)):
        pattern = "dense" if arm == "dense" else "every_other"
        run = write_run(root, f"pair/{arm}", loss=loss, pattern=pattern)
    write_swaps(run)
    arms = {arm: {"runs": [f"pair/{arm}"], "is_routed": arm == "mod"} for arm in ("dense", "mod")}
    write_comparison(root, "pair", arms)
    write_grid(root, "grid")
    write_run(root, NASTY)
    write_run(root, "other", shards="6" * 64)
    write_run(root, "short", complete=False)


@pytest.mark.slow
def test_a_page_needs_nothing_from_outside(root, undrawn):
    full(root)
    page = page_of(report_of(root))
    for tag in ("link", "img", "iframe", "object", "base", "form"):
        assert not page.all(tag)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        assert not re.match(r"[a-z]+:|//", attributes.get("href") or "")
    figures, plotly, own = page.scripts
    assert "plotly.js v" in plotly[:200]
    for text in (figures, own, page.text):
        assert not re.search(r"https?:|url\(|@import", text)
    policy = page.all("meta")[3]["content"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_names_from_runs_are_shown_and_not_obeyed(root, undrawn):
    full(root)
    page = page_of(report_of(root))
    assert len(page.all("script")) == 3
    assert not page.all("b")
    assert page.text.count(NASTY) >= 3
    specs = json.loads(page.scripts[0])
    traces = [trace for spec in specs.values() for trace in spec.get("data", [])]
    names = [trace["name"] for trace in traces if "script" in trace.get("name", "")]
    assert names
    assert all("<" not in name for name in names)
    texts = [trace["text"] for trace in traces if "name" in trace and "text" in trace]
    assert all(not re.search(r"<(?!br>)", text) for of_trace in texts for text in of_trace)


def test_every_row_leads_to_its_directory_and_command(root, undrawn):
    full(root)
    page = page_of(report_of(root))
    output = root.parent / "report"
    links = {attributes["href"] for attributes in page.all("a")}
    for name in ("pair/mod", "other", NASTY):
        for file in ("", "command.txt"):
            path = [h for h in links if h.endswith(f"/{file}") and unquoted(h, output)]
            assert (root / name / file).resolve() in [unquoted(h, output) for h in path]


def unquoted(address, folder):
    from urllib.parse import unquote

    return (folder / unquote(address)).resolve()


def test_an_address_is_a_path_whatever_the_name():
    assert link("../runs/javascript:a?b#c%41 d") == "../runs/javascript%3Aa%3Fb%23c%2541%20d"
    assert link("\udcff") == "%FF"


def test_runs_left_out_and_warnings_stand_on_the_page(root, undrawn):
    full(root)
    text = page_of(report_of(root)).text
    assert "short is not complete: stopped" in text
    assert "1 more is left out" in text
    assert "The runs are on 2 data or held-out sets." in text
    assert "mod beats dense at this size: causal loss -3.33%" in text


def test_figures_are_valid_for_plotly_and_have_the_losses(root):
    full(root)
    first, second = collect(report_of(root, include_incomplete=True)).groups
    figures = {figure.key: figure for figure in interactive_figures(first, "")}
    assert list(figures) == ["loss", "cost", "isoflop-0", "capacity", "health", "worth", "swaps"]
    assert len(interactive_figures(second, "x-")) == 5
    for figure in figures.values():
        for data in [figure.spec.get("data")] + [c["data"] for c in figure.spec.get("choices", [])]:
            if data is not None:
                go.Figure({"data": data, "layout": figure.spec["layout"]})
    drawn = figures["loss"].spec["data"]
    by_name = dict(zip([run.name for run in first.runs], drawn, strict=True))
    assert by_name["pair/mod"]["y"][-1] == 2.9
    assert by_name["short"]["line"]["dash"] == "dash"
    assert by_name["pair/mod"]["line"]["dash"] == "solid"
    labels = [view["label"] for view in figures["loss"].spec["views"]]
    assert labels == ["training FLOPs", "training tokens", "hours of training steps"]


def test_a_point_on_the_front_is_beaten_by_none_of_lower_cost():
    points = {
        "a": (1, 3.0),
        "b": (2, 3.5),
        "c": (3, 2.0),
        "d": (3, 2.0),
        "e": (4, 1.0),
        "f": (1, 4),
    }
    assert pareto_front(points) == ["a", "c", "e"]
    assert pareto_front({}) == []


def test_curves_are_shown_without_the_first_losses(root):
    write_run(root, "a", loss=3.0, steps=100)
    write_run(root, "b", loss=2.5, steps=100)
    low, high = loss_range(collect(report_of(root)).runs)
    # Ten evaluations each, which fall by 0.2: the highest of the last eight.
    assert low == pytest.approx(2.5 - 0.05 * (4.4 - 2.5))
    assert high == pytest.approx(4.4 + 0.05 * (4.4 - 2.5))


def test_short_names_lack_what_all_share():
    assert short_names(["s/a/x", "s/b/x"]) == ["a/x", "b/x"]
    assert short_names(["s/a"]) == ["a"]
    assert short_names(["x" * 40, "y"]) == ["…" + "x" * 21, "y"]


def test_colours_can_be_seen_on_both_pages():
    for colour, ground in product(COLOURS, ("#ffffff", "#14171a")):
        low, high = sorted([luminance(colour), luminance(ground)])
        assert (high + 0.05) / (low + 0.05) >= 3, (colour, ground)


@pytest.mark.slow
def test_figures_and_tables_are_written_as_files_too(root):
    for name in ("dense", "mod"):
        write_run(root, name, pattern="dense" if name == "dense" else "every_other")
    write_run(root, "other", shards="6" * 64, pattern="dense")
    report(report_of(root))
    files = {path.name for path in (root.parent / "report").iterdir()}
    assert {"index.html", "runs.csv", "runs.json", "runs.tex"} <= files
    costs = [f"loss_over_{n}" for n in ("flops", "tokens", "seconds", "forward_flops", "step_time")]
    for name in (*costs, "capacity", "router_health", "router_worth"):
        assert {f"data-1-{name}.svg", f"data-1-{name}.png"} <= files
    assert "data-2-loss_over_flops.svg" in files
    assert "data-2-capacity.svg" not in files


@pytest.mark.slow
def test_real_runs_are_reported(tiny, tmp_path, capsys):
    folder = tmp_path / "runs"
    for name, pattern in (("dense", "dense"), ("mod", "every_other")):
        overrides = [*tiny, f"runs_dir={folder}", f"name={name}", f"model.pattern={pattern}"]
        train(compose("train", [*overrides, "log.progress=false", "log.tensorboard=false"]))
    output = tmp_path / "page"
    capsys.readouterr()
    words = ["report", "runs=['*']", f"runs_dir={folder}", f"output={output}"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.endswith(f"2 runs, 0 left out\nwrote {output}/index.html\n")
    rows = {row["run"]: row for row in json.loads((output / "runs.json").read_text())}
    for name in ("dense", "mod"):
        result = json.loads((folder / name / "result.json").read_text())
        assert rows[name]["loss"] == result["held_out/causal_loss"]
        assert rows[name]["flops"] == result["flops"]
        assert rows[name]["causal_forward_flops"] == result["held_out/causal_flops_per_token"]
        assert rows[name]["step_seconds"] > 0
    differing = {key for key in rows["mod"] if key.startswith("config.")}
    assert differing == {"config.model.pattern"}
    routers = json.loads((output / "routers.json").read_text())
    assert {row["run"] for row in routers} == {"mod"}
    single = [row for row in routers if row["router"] != "all"]
    assert single
    assert all(row["gate_mean"] is not None and row["worth"] is not None for row in single)


@pytest.mark.slow
def test_a_browser_shows_all_of_it(browser, root, undrawn):
    full(root)
    report(report_of(root))
    path = root.parent / "report/index.html"
    page = browser.new_page(viewport={"width": 390, "height": 900})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    for width, scheme in ((390, "light"), (1300, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_selector(f"html[data-drawn={scheme}]", timeout=60_000, state="attached")
        page.wait_for_timeout(300)
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide == width
        boxes = page.evaluate(
            "() => [...document.querySelectorAll('.plot .main-svg')].map("
            "(svg) => svg.getBoundingClientRect().width)"
        )
        assert len(boxes) >= 10
        assert all(0 < box <= width for box in boxes)
    page.click("button[data-figure=data-1-loss][data-view='1']")
    page.wait_for_function(
        "() => document.querySelector('#data-1-loss .xtitle').textContent === 'training tokens'"
    )
    page.click("#runs th button:text-is('causal loss (nats a token)')")
    shown = page.eval_on_selector_all(
        "#runs tbody th a:first-child", "links => links.map((link) => link.textContent)"
    )
    rows = json.loads((path.parent / "runs.json").read_text())
    assert shown == [row["run"] for row in sorted(rows, key=lambda row: row["loss"])]
    page.close()
    assert messages == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
