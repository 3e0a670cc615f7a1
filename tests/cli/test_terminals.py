"""Tables and bars on real pseudo-terminals: 60, 80, 120 and 200 columns, with and without colour.

The snapshots are in `snapshots/`; MODTRAIN_SNAPSHOTS=write writes them anew, to be read before they
are committed.
"""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

import modtrain
from modtrain.cli import main as cli
from modtrain.common.terminal import Column, fitted_table, plain_console
from modtrain.experiments.compare.comparison_report import show as show_comparison
from modtrain.training.callbacks import progress
from modtrain.training.stop_signal import STOP
from tests.experiments.report.report_cases import write_run
from tests.helpers.terminal import in_terminal, without_escapes

SNAPSHOTS = Path(__file__).parent / "snapshots"
WIDTHS = (60, 80, 120, 200)
LONG = "a_long_name/of/a/sweep/model.capacity=0.125,optimizer.lr=0.004"
NAMES = ("[v1] x", "x[/b]", ":fire:", LONG)
# Colours of the terminal's own sixteen, which its light or dark theme makes readable.
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|9[0-7]|38;\S*?|48;\S*?)m")
SHOWN_BY_THEME = re.compile(r"\x1b\[(?:[0-9];|0;)*(?:3[0-7]|9[0-7])m")

on_widths = pytest.mark.parametrize(
    "columns", [WIDTHS[0], *(pytest.param(width, marks=pytest.mark.slow) for width in WIDTHS[1:])]
)


def check_snapshot(name, text):
    path = SNAPSHOTS / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("MODTRAIN_SNAPSHOTS") == "write":
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def assert_fits(output, columns):
    for line in without_escapes(output).splitlines():
        assert cell_len(line) <= columns, line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("at")
    for name in NAMES:
        write_run(root, name, complete=name != NAMES[0])
    for path in root.rglob("*"):
        os.utime(path, (0, 0))
    return root


def status(root):
    assert cli.main(["status", f"runs_dir={root}"]) == 0


@on_widths
def test_status_shows_run_and_state_in_each_width(runs, columns):
    output = in_terminal(partial(status, runs), columns)
    assert_fits(output, columns)
    shown = without_escapes(output)
    for name in NAMES[:3]:
        assert re.search(rf"│ {re.escape(name)} +│ (complete|stopped) +│", shown)
    # Below the table are paths of the day.
    check_snapshot(f"status-{columns}", shown.partition("4 runs")[0])
    assert len(COLOUR.findall(output)) == len(SHOWN_BY_THEME.findall(output))
    plain = in_terminal(partial(status, runs), columns, NO_COLOR="1")
    assert not COLOUR.search(plain)
    assert without_escapes(plain) == shown


@pytest.mark.parametrize("columns", [60, pytest.param(120, marks=pytest.mark.slow)])
def test_costs_break_no_number(runs, columns):
    output = in_terminal(lambda: cli.main(["status", f"runs_dir={runs}", "cost=true"]), columns)
    table = without_escapes(output).rpartition("┘")[0]
    assert_fits(table, columns)
    assert "…" not in table
    assert re.search(r"│ x\[/b\] +│.* unknown │ cores │", table)


@pytest.mark.slow
@on_widths
def test_a_plan_fits(columns):
    words = ["plan", "model=mod_60m", "data.seq_len=512", "model.vocab_size=2048"]
    output = in_terminal(lambda: cli.main([*words, "budget.flops=6e18"]), columns)
    assert_fits(output.rpartition("what counts")[0], columns)
    check_snapshot(f"plan-{columns}", without_escapes(output))


@on_widths
@pytest.mark.parametrize("num_arms", [2, 6])
def test_a_comparison_breaks_no_number(columns, num_arms):
    arm = {
        **dict.fromkeys(("causal_loss_spread", "top_k_loss_not_causal", "control")),
        **{"causal_loss": 3.25, "flops": 1.234e18, "steps": 12_345, "tokens": 1_234_567_890},
        **{"forward_flops_per_token": 123_456_789.0, "causal_flops_per_token": 98_765_432.0},
        **{"micro_batch_seconds": 0.5, "is_routed": False, "causal_losses": {"0": 3.25}},
    }
    report = {f"[v{number}]": arm for number in range(num_arms)}
    output = in_terminal(lambda: show_comparison(report, 0.0, plain_console()), columns)
    table = output.rpartition("┘")[0]
    assert_fits(table, columns)
    if columns >= 80 and num_arms == 2:
        assert all(text in output for text in ("[v0]", "3.2500", "1,234,567,890", "123,456,789"))


def draw_bar(monkeypatch, label, steps):
    module = SimpleNamespace(
        plan=SimpleNamespace(steps=steps, flops=6e18, flops_until=lambda step: 6e18 * step / steps)
    )
    monkeypatch.setattr(progress, "language_module", lambda module: module)
    latest = {"loss": 2.345, "throughput/tokens_per_second": 123_456.0}
    bar = progress.ProgressCallback(SimpleNamespace(latest=latest), label)
    trainer = SimpleNamespace(global_step=0)
    bar.on_train_start(trainer, module)
    bar.on_step_end(trainer, module, steps // 2)
    return bar


@on_widths
@pytest.mark.parametrize("label", [NAMES[0], NAMES[3]])
def test_the_bar_has_a_bar_a_step_and_the_time_left(monkeypatch, columns, label):
    output = in_terminal(
        lambda: draw_bar(monkeypatch, label, 12_345).on_train_end(), columns, NO_COLOR="1"
    )
    line = [line for line in without_escapes(output).splitlines() if "step 6172/12345" in line][-1]
    line = line.rpartition("\r")[2]
    assert cell_len(line) <= columns
    assert line.startswith(label[:10])
    assert line.count("━") + line.count("╸") + line.count("╺") >= 3
    assert re.search(r"left (\d+:\d\d:\d\d|-:--:--)", line)
    assert ("loss 2.345" in line) == (columns >= 80)
    assert ("of 6e+18 FLOPs" in line) == (columns >= 120)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_prints_what_it_does_and_leaves_the_cursor_visible(monkeypatch, times):
    def interrupt():
        STOP.install()
        bar = draw_bar(monkeypatch, "a", 10)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5 if times > 1 else 0)
        bar.on_train_end()

    output = in_terminal(interrupt, 80)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    notice = "\nstops once this step is done and saved; Ctrl-C again ends it at once, unsaved\n"
    assert output.count(notice) == 1
    assert_fits(output, 80)


def test_rank_0_alone_prints_that_the_ranks_stop(monkeypatch):
    def interrupt():
        STOP.install()
        os.kill(os.getpid(), signal.SIGINT)

    assert in_terminal(interrupt, 80, RANK="1") == ""


def test_what_does_not_fit_is_named():
    columns = [Column("run"), Column("loss", 1), Column("empty", 2)]
    rows = [["name", "1.2345", ""]]

    def width(width):
        console = plain_console(width=100)
        with console.capture() as capture:
            console.print(fitted_table(columns, rows, width))
        return capture.get()

    assert "not shown" not in width(30)
    assert "empty" in width(30)
    assert "not shown" not in width(20)
    assert "empty" not in width(20)
    assert "not shown at 12 columns: loss" in " ".join(width(12).split())
    assert "name" in width(1)


def test_all_that_is_printed_goes_through_the_console_without_markup():
    root = Path(modtrain.__file__).parent
    sources = (path for path in root.rglob("*.py") if path.name != "terminal.py")
    using = [path for path in sources if re.search(r"(?<![\w.])Console\(", path.read_text())]
    assert using == []
