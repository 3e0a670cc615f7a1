"""Tables as CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from modtrain.common.atomic_io import write_text
from modtrain.experiments.report.tables import Table

_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def write_table(table: Table, directory: Path) -> list[Path]:
    """Write the table in each format; return the paths."""
    contents = {"csv": to_csv(table), "json": to_json(table), "tex": to_latex(table)}
    paths = []
    for ending, text in contents.items():
        paths.append(directory / f"{table.name}.{ending}")
        write_text(paths[-1], text)
    return paths


def to_csv(table: Table) -> str:
    """Return the table with all its columns and unrounded numbers; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [column.key for column in table.columns]
    writer.writerow(keys)
    writer.writerows([row[key] for key in keys] for row in table.rows)
    return text.getvalue()


def to_json(table: Table) -> str:
    """Return the rows as a list of objects, in strict JSON."""
    keys = [column.key for column in table.columns]
    rows = [{key: row[key] for key in keys} for row in table.rows]
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


def to_latex(table: Table) -> str:
    """Return a ``tabular`` that needs no package, with what the page shows."""
    columns = table.shown
    alignment = "".join("r" if column.is_number else "l" for column in columns)
    lines = [" & ".join(latex(column.title) for column in columns)]
    lines += [
        " & ".join(latex(column.show(row[column.key])) for column in columns) for row in table.rows
    ]
    head, *body = (f"{line} \\\\" for line in lines)
    rule = "\\hline"
    parts = [f"\\begin{{tabular}}{{{alignment}}}", rule, head, rule, *body, rule]
    return "\n".join([f"% {latex(table.title)}", *parts, "\\end{tabular}"]) + "\n"


def latex(text: str) -> str:
    """Return ``text`` as LaTeX shows it letter by letter, on one line."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return "".join(_LATEX.get(letter, letter) for letter in line)
