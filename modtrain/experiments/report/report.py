"""`modtrain report`: one page, figures and tables of finished runs. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import raise_if_any
from modtrain.common.terminal import last_output, plain_console
from modtrain.experiments.report.collect import Collection, collect
from modtrain.experiments.report.config import ReportConfig
from modtrain.experiments.report.page import relative_directories, render
from modtrain.experiments.report.static import write_figures
from modtrain.experiments.report.table_files import write_table
from modtrain.experiments.report.tables import make_tables

PAGE = "index.html"


def report(config: ReportConfig, console: Console | None = None) -> None:
    """Read the runs, write the page with its figures and tables, and print what was left out.

    Raises:
        ConfigError: the configuration is wrong, or names no run.
        DataError: no run can be reported.
    """
    raise_if_any(config.problems())
    collection = collect(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    directories = relative_directories(collection, output)
    tables = make_tables(collection, directories)
    paths = [path for table in tables for path in write_table(table, output)]
    for place, group in enumerate(collection.groups, 1):
        prefix = f"data-{place}-" if len(collection.groups) > 1 else ""
        paths += write_figures(group, prefix, output)
    # Written last: where it is, the files that it names are.
    names = [path.name for path in paths]
    page = render(collection, tables, directories, names, config.equivalence_margin)
    write_text(output / PAGE, page)
    _show(collection, output / PAGE, console or plain_console())


def _show(collection: Collection, page: Path, console: Console) -> None:
    lines = [f"warning: {line}" for line in collection.warnings]
    lines += [f"left out: {run.name}: {run.reason}" for run in collection.left_out]
    count = f"{len(collection.runs)} runs, {len(collection.left_out)} left out"
    with last_output():
        for line in lines:
            shown = "".join(letter if letter.isprintable() else "?" for letter in line)
            console.print(shown, soft_wrap=True, highlight=False)
        console.print(f"{count}\nwrote {page}", soft_wrap=True, highlight=False)
