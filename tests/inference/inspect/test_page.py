"""The page: against a parser, from the command line, and in a browser."""

import base64
import math
import re
from dataclasses import replace
from itertools import product

import pytest

from modtrain.cli import main as cli
from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError, DataError
from modtrain.inference.config import ComputeBudgetConfig, EvalRunConfig, InspectConfig
from modtrain.inference.evaluate.evaluate import evaluate_run
from modtrain.inference.inspect import figures as inspect_figures
from modtrain.inference.inspect.figures import luminance, themes
from modtrain.inference.inspect.inspect import inspect_run
from modtrain.inference.inspect.page import most_and_least_routed, render
from modtrain.training.run import train
from tests.inference.inspect.inspect_cases import (
    NASTY,
    Parsed,
    contrast,
    model_of,
    page_of,
    subject,
)


def assert_self_contained(page: Parsed) -> None:
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert all(attributes["alt"] for attributes in page.all("img"))


@pytest.fixture
def undrawn(monkeypatch):
    """Where the figures do not matter: they take most of a page's time."""
    monkeypatch.setattr(inspect_figures, "_svg", lambda *_: "<svg/>")


@pytest.fixture(scope="module")
def nasty(tokenizer):
    return page_of("staged", "threshold", NASTY, tokenizer)


def test_a_page_is_well_formed_escaped_and_needs_nothing_from_outside(nasty):
    _, pieces, source = nasty
    page = Parsed(source)
    assert_self_contained(page)
    assert not re.search(r"https?:|url\(|@import", source)
    assert "<script" not in source
    assert "a <b>run</b>" in page.text
    assert "<script>source.txt" in page.text
    assert page.tokens == [piece.shown for piece in pieces]
    assert "<script>" in "".join(page.tokens)
    assert page.sections == ["text", "strips", "depth", "tokens", "routers", "experts"]


def test_the_figures_have_the_colours_of_their_page_and_only_those(nasty):
    _, _, source = nasty
    page = Parsed(source)
    pairs = list(zip(page.all("img"), page.all("source"), strict=True))
    # The strips, depth against four things, a histogram a router.
    assert len(pairs) == 1 + 4 + 2
    light, dark = themes(2)
    for image, alternative in pairs:
        assert alternative["media"] == "(prefers-color-scheme: dark)"
        one, two = (
            base64.b64decode(uri.partition("base64,")[2]).decode()
            for uri in (image["src"], alternative["srcset"])
        )
        assert one.startswith("<?xml")
        assert light.text in one
        assert dark.text in two
        for colour in (dark.text, dark.line, dark.faint):
            assert colour not in one
        for colour in (light.text, light.line, light.faint):
            assert colour not in two


def test_each_token_shows_its_own_numbers(nasty):
    trace, pieces, source = nasty
    tips = [a for a in Parsed(source).all("span") if "title" in a]
    assert len(tips) == len(pieces)
    for place, (tip, piece) in enumerate(zip(tips, pieces, strict=True)):
        depth = int(trace.depths[place])
        assert tip.get("class") == (f"d{depth}" if depth else None)
        first, where, entered, quality = tip["title"].rsplit("\n", 3)
        part = f", part of {piece.characters}" if piece.characters else ""
        shown = piece.shown.strip("\n")
        assert first == f"{shown} : token {trace.token_N[place]}{part}"
        assert where == f"no. {place + 1} of the text, {trace.position_N[place]} of its window"
        names = [r.label[-2:] for r in trace.routers if r.chosen_N[place]]
        listed = f": {', '.join(names)}" if names else ""
        assert entered == f"entered {depth} of {len(trace.routers)}{listed}"
        loss = "-" if math.isnan(trace.loss_N[place]) else f"{trace.loss_N[place]:.2f}"
        assert quality == f"loss {loss}, entropy {trace.entropy_N[place]:.2f} nats"


def test_the_header_and_the_legend_have_the_figures(nasty):
    trace, pieces, source = nasty
    text = Parsed(source).text
    assert "step 12,345" in text
    assert "threshold (causal)" in text
    assert f"{trace.mean_loss:.4f} nats a token" in text
    assert "not causal" not in text
    for r in trace.routers:
        row = f"{r.label[-2:]} 0.2500 {r.chosen_N.mean():.4f} score {r.threshold:.3g}"
        assert f"{row} {r.gate_mean:.3f} {r.update_ratio:.3f} not known" in text
    for depth in range(3):
        count = int((trace.depths == depth).sum())
        assert f"{depth} of 2: {count} tokens, {100 * count / len(pieces):.1f}%" in text
    for mixture in trace.experts:
        shares = " ".join(f"{100 * share:.1f}" for share in mixture.share_E)
        assert f"{mixture.label[-2:]} {shares}" in text


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("dense", ["text"]),
        ("integrated", ["text", "experts"]),
        ("expert choice", ["text", "experts"]),
        ("fixed", ["text", "strips", "depth", "tokens", "routers"]),
    ],
)
def test_a_page_lacks_what_does_not_apply_and_names_it(kind, sections, tokenizer, undrawn):
    trace, _, source = page_of(kind, "causal", "the river", tokenizer)
    page = Parsed(source)
    assert_self_contained(page)
    assert page.sections == sections
    assert ("has no depth routing" in page.text) == ("strips" not in sections)
    assert ("has no mixtures of experts" in page.text) == ("experts" not in sections)
    if kind == "integrated":
        assert "0 1 2 no-op 0 no-op 1 no-ops together" in page.text
        for mixture in trace.experts:
            shares = [*mixture.share_E, mixture.share_E[-2:].sum()]
            row = " ".join(f"{100 * share:.1f}" for share in shares)
            assert f"{mixture.label[-2:]} {row}" in page.text
        barred = [
            "noop" in (cell.get("class") or "")
            for cell in page.all("td")[-6 * len(trace.experts) :]
        ]
        assert barred == [False, False, False, True, False, True] * len(trace.experts)
    if kind == "expert choice":
        assert "no-op 0" not in page.text
    if kind == "fixed":
        assert "ignore the tokens' content" in page.text


def test_the_most_and_least_routed_tokens_are_those_of_a_slow_count(tokenizer, undrawn):
    trace, pieces, _ = page_of("mod", "predictor", "the river under the tree " * 8, tokenizer)
    least_count, most, least = most_and_least_routed(trace, pieces)
    depths = {}
    for token, depth in zip(trace.token_N.tolist(), trace.depths.tolist(), strict=True):
        depths.setdefault(token, []).append(depth)
    means = {token: sum(d) / len(d) for token, d in depths.items() if len(d) >= least_count}
    for row in most + least:
        assert row["depth"] == pytest.approx(means[row["token"]])
        assert row["count"] == len(depths[row["token"]])
        assert row["shown"] == pieces[trace.token_N.tolist().index(row["token"])].shown
    tokens = [row["token"] for row in most + least]
    assert len(set(tokens)) == len(tokens) == len(means)
    assert [row["depth"] for row in most] == sorted(means.values(), reverse=True)[: len(most)]
    assert [row["depth"] for row in least] == sorted(means.values())[: len(least)]


def test_a_page_has_the_flops_the_agreement_and_the_models_configuration(tokenizer, undrawn):
    trace, pieces, _ = page_of("mod", "predictor", "the river " * 8, tokenizer)
    model = model_of("mod", vocab_size=tokenizer.get_vocab_size())
    given = replace(subject(model, "predictor"), model="d_model: 8\nname: <b>")
    page = Parsed(render(given, trace, pieces, 2000))
    assert f"{100 * trace.flops / trace.dense_flops:.1f}% of dense" in page.text
    assert "d_model: 8 name: <b>" in page.text
    for r in trace.routers:
        shares = (r.agreement.accuracy, r.agreement.balanced_accuracy)
        assert " ".join(f"{share:.1%}" for share in shares) in page.text
    assert f"{len(pieces)} tokens: a point is the mean of a few" in page.text


def test_top_k_is_labelled_not_causal(tokenizer, undrawn):
    _, _, source = page_of("mod", "top_k", "the river", tokenizer)
    text = Parsed(source).text
    assert "not causal: top_k depends on later tokens" in text
    assert "loss, not causal" in text
    assert "causal loss" not in text


def test_a_single_token_makes_a_page_too(tokenizer):
    trace, _, source = page_of("mod", "predictor", "t", tokenizer)
    assert trace.mean_loss is None
    assert "none: a single token" in Parsed(source).text


def test_a_long_text_is_shown_in_part_counted_whole_and_stays_small(tokenizer, undrawn):
    trace, pieces, source = page_of(
        "mod", "predictor", ("the tree " * 5000).strip(), tokenizer, 1500
    )
    page = Parsed(source)
    assert len(pieces) == 10000
    assert len(page.tokens) == 1500
    assert "The first 1,500 of 10,000 tokens" in page.text
    assert f"{trace.routers[0].chosen_N.mean():.4f}" in page.text
    assert len(source) < 2e6


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    overrides = [*tiny, "budget.steps=2", "eval.every=null", "log.tensorboard=false"]
    train(compose("train", [*overrides, "log.progress=false", f"runs_dir={folder}", "name=a"]))
    return folder / "a"


@pytest.mark.slow
def test_a_run_is_inspected_on_held_out_text_a_text_and_a_file(run, tmp_path, capsys, undrawn):
    common = ["inspect", "run=a", f"runs_dir={run.parent}", "accelerator=cpu"]
    assert cli.main([*common, "sequences=2"]) == 0
    path = run / "inspect-000000002.html"
    assert capsys.readouterr().out == f"wrote {path}\n"
    page = Parsed(path.read_text())
    assert "held-out text" in page.text
    assert "128, in windows of 64" in page.text
    request = EvalRunConfig("a", str(run.parent), sequences=2, accelerator="cpu", swap=True)
    figures = evaluate_run(request)
    assert f"{figures['causal_loss']:.4f} nats a token" in page.text
    for row in figures["router_worth"]["swaps"]:
        if row["router"] != "all":
            assert f"{row['change']:+.2%}" in page.text
    assert cli.main([*common, "text='the river'", f"output={tmp_path}/one.html"]) == 0
    one = Parsed((tmp_path / "one.html").read_text())
    assert "the text given" in one.text
    assert "".join(one.tokens) == "the river"
    (tmp_path / "mine.txt").write_text(NASTY, encoding="utf-8")
    assert cli.main([*common, f"file={tmp_path}/mine.txt", f"output={tmp_path}/two.html"]) == 0
    two = Parsed((tmp_path / "two.html").read_text())
    assert "mine.txt" in two.text
    assert "<script>alert(1)</script>" in "".join(two.tokens)


def test_a_page_is_written_whole_and_the_same_each_time(run, tmp_path):
    pages = []
    for name in ("one", "two"):
        output = str(tmp_path / name)
        config = InspectConfig("a", str(run.parent), text="the river", output=output)
        pages.append(inspect_run(config).read_bytes())
    assert pages[0] == pages[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_mistakes_of_an_inspection_are_reported(run, tmp_path, capsys, undrawn):
    common = ["inspect", f"runs_dir={run.parent}"]
    wrong = ["text=a", "file=b", "batch_size=0", "tokens_shown=0", "sequences=0"]
    assert cli.main([*common, *wrong]) == 2
    printed = capsys.readouterr().err
    for key in ("run=null", "file=b", "batch_size=0", "tokens_shown=0", "sequences=0"):
        assert key in printed
    latin, empty = tmp_path / "latin", tmp_path / "empty"
    latin.write_bytes(b"caf\xe9 noir")
    empty.touch()
    for changes, error, word in (
        (
            {"inference": ComputeBudgetConfig("auxiliary")},
            ConfigError,
            "use one of: predictor, top_k",
        ),
        ({"text": ""}, ConfigError, "is empty"),
        ({"file": str(tmp_path / "none")}, ConfigError, "is no file"),
        ({"file": str(latin)}, DataError, "is not UTF-8"),
        ({"file": str(empty)}, DataError, "has no token"),
    ):
        with pytest.raises(error, match=word):
            inspect_run(InspectConfig("a", str(run.parent), **changes))
    assert InspectConfig("a", text="\udc80").problems()


# Every picture is there, and is the one for the page's colours.
SWITCHED = """(dark) => [...document.images].every((image) =>
  image.complete && image.naturalWidth > 0 && (image.currentSrc !== image.src) === dark)"""
READ = """() => {
  const outside = (element) => !element.closest('details');
  const all = (selector) => [...document.querySelectorAll(selector)].filter(outside);
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const ground = numbers(getComputedStyle(document.documentElement).backgroundColor);
  const colours = new Set();
  for (const element of all('h1, p, dt, dd, td, th, li b, .text span, figcaption')) {
    const style = getComputedStyle(element), own = numbers(style.backgroundColor);
    const pair = [numbers(style.color), own[3] === 0 ? ground : own];
    colours.add(JSON.stringify(pair.map((color) => color.slice(0, 3))));
  }
  const box = (element) => element.getBoundingClientRect();
  return {
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    boxes: all('section, figure img, .text, .scroll').map(box).map((b) => [b.width, b.height]),
    ground: ground,
    colours: [...colours].map((pair) => JSON.parse(pair)),
  };
}"""


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["staged", "integrated"])
def test_a_browser_shows_all_of_it_legibly(browser, kind, tokenizer, tmp_path):
    selection = model_of(kind).config.causal_selections[0]
    _, _, source = page_of(kind, selection, 3 * NASTY + 300 * "w", tokenizer)
    path = tmp_path / "page.html"
    path.write_text(source, encoding="utf-8")
    page = browser.new_page()
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    for width, scheme in product((400, 1400), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_function(SWITCHED, arg=scheme == "dark", timeout=10_000)
        seen = page.evaluate(READ)
        assert seen["overflow"] == 0
        assert len(seen["boxes"]) > 3
        assert all(0 < wide <= width and high > 20 for wide, high in seen["boxes"])
        assert (luminance(hexadecimal(seen["ground"])) < 0.1) == (scheme == "dark")
        tip = "getComputedStyle(document.activeElement, '::after').content"
        page.locator(".text span").nth(2).click()
        assert "no. 3 of the text" in page.evaluate(tip)
        is_narrow = width == 400
        assert page.locator(".hint:not(details *)").first.is_visible() == is_narrow
        for letters, ground in seen["colours"]:
            assert contrast(hexadecimal(letters), hexadecimal(ground)) >= 4.5
    page.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]


def hexadecimal(color: list[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color[:3])
