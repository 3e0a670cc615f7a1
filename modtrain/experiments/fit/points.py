"""The points that a law is fitted to: finished trainings, from a CSV file or from lists.

Shape suffixes, in this package: P points, S resamples, K parameters of the law.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.common.errors import DataError, Problem
from modtrain.experiments.fit.config import QUANTITIES, FitConfig

Array = NDArray[np.float64]

ONLY_FAMILY = "all"
"""The family of points that name none."""
_SIZES = ("N", "D", "C")
_FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
_NUM_SHOWN = 20
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Points:
    """Finished trainings.

    loss_P: final held-out losses, nats a token. N_P: parameters. D_P: training tokens. C_P:
    training FLOPs. families: of each point. rows: of each point in its source, where in a file row
    1 has the headings. derived: the quantity that was computed by C = 6ND, or "".
    """

    loss_P: Array
    N_P: Array
    D_P: Array
    C_P: Array
    families: tuple[str, ...]
    rows: tuple[int, ...]
    derived: str = ""

    def __len__(self) -> int:
        return len(self.loss_P)

    def select(self, keep: NDArray[np.bool_]) -> Points:
        """Return the points for which ``keep``, of shape (P,), is true."""
        chosen = np.flatnonzero(keep)
        return replace(
            self,
            loss_P=self.loss_P[chosen],
            N_P=self.N_P[chosen],
            D_P=self.D_P[chosen],
            C_P=self.C_P[chosen],
            families=tuple(self.families[i] for i in chosen),
            rows=tuple(self.rows[i] for i in chosen),
        )

    def by_family(self) -> dict[str, Points]:
        """Return the points of each family, in the order of the families' first points."""
        names = np.array(self.families, dtype=object)
        return {name: self.select(names == name) for name in dict.fromkeys(self.families)}

    def without_highest(self, count: int) -> Points:
        """Return all but the ``count`` points with the highest losses."""
        keep = np.ones(len(self), dtype=bool)
        keep[np.argsort(self.loss_P, kind="stable")[len(self) - min(count, len(self)) :]] = False
        return self.select(keep)


def make_points(
    loss: Sequence[Any],
    N: Sequence[Any] | None = None,
    D: Sequence[Any] | None = None,
    C: Sequence[Any] | None = None,
    family: Sequence[str] | None = None,
    source: str = "points",
) -> Points:
    """Return points from lists with an entry for each training: numbers, or their text.

    Two of N, D and C are needed; the third is then by C = 6ND. source: what errors name.

    Raises:
        DataError: everything wrong with the values, by row, the first being 1.
    """
    given = {"loss": loss, "N": N, "D": D, "C": C}
    columns = {name: values for name, values in given.items() if values is not None}
    if family is not None:
        columns["family"] = family
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(values)}" for name, values in columns.items())
        raise DataError(f"{source}: the lists differ in length ({lengths})")
    rows = tuple(range(1, len(loss) + 1))
    return _points(columns, {name: name for name in columns}, source, rows)


def read_points(path: Path, config: FitConfig) -> Points:
    """Return the points of a CSV file whose first row has the headings.

    Raises:
        DataError: the file is too large or not CSV, a column is missing or there twice, or a value
            is not usable: all of these by row and column.
    """
    headings, records = _read_csv(path, config.max_bytes)
    names = {name: config.columns.get(name, name) for name in QUANTITIES}
    _check_headings(path, headings, names, config)
    used = {name: headings.index(h) for name, h in names.items() if h in headings}
    columns = {name: [record[at] for record in records.values()] for name, at in used.items()}
    return _points(columns, names, str(path), tuple(records))


def _read_csv(path: Path, max_bytes: int) -> tuple[list[str], dict[int, list[str]]]:
    """Return the headings, and the cells of each row that is not blank; the first one is row 2."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(
            f"{path}: is larger than {max_bytes:,} bytes\n"
            "    remedy: leave rows and columns out, or raise max_bytes"
        )
    try:
        text = content.decode("utf-8-sig")
        headings, *lines = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        remedy = "save it as CSV with commas, in UTF-8"
        raise DataError(f"{path}: is not CSV: {error}\n    remedy: {remedy}") from None
    headings = [heading.strip() for heading in headings]
    records = {row: cells for row, cells in enumerate(lines, 2) if cells}
    problems = [
        Problem(f"row {row}", "", f"has {len(cells)} cells", f"write {len(headings)}, as in row 1")
        for row, cells in records.items()
        if len(cells) != len(headings)
    ]
    _raise_if_any(str(path), problems)
    return headings, records


def _check_headings(
    path: Path, headings: list[str], names: Mapping[str, str], config: FitConfig
) -> None:
    shown = ", ".join(_shown(heading) for heading in headings) or "none"
    there = f"the file's headings, upper and lower case as they are: {shown}"
    remedy = f"{there}; to use another one: 'columns={{loss: HEADING}}'"
    problems = [
        Problem(f"column {_shown(heading)}", "", "is there twice", "rename one of them, or cut it")
        for heading in dict.fromkeys(headings)
        if headings.count(heading) > 1
    ]
    wanted = {"loss", *config.columns}
    problems += [
        Problem(f"column {names[name]}", "", "is missing", remedy)
        for name in QUANTITIES
        if name in wanted and names[name] not in headings
    ]
    if sum(names[name] in headings for name in _SIZES) < 2:
        sizes = ", ".join(names[name] for name in _SIZES)
        reason = "fewer than two of them are there"
        problems.append(Problem(f"columns {sizes}", "", reason, remedy))
    _raise_if_any(str(path), problems)


def _points(
    columns: Mapping[str, Sequence[Any]],
    headings: Mapping[str, str],
    source: str,
    rows: tuple[int, ...],
) -> Points:
    """Convert the columns, which are by quantity."""
    if sum(name in columns for name in _SIZES) < 2:
        raise DataError(f"{source}: two of N, D and C are needed")
    if not rows:
        raise DataError(f"{source}: has no points\n    remedy: write a row for each training")
    problems: list[Problem] = []
    numbers: dict[str, Array] = {}
    for name in ("loss", *_SIZES):
        if name in columns:
            numbers[name], wrong = _numbers(columns[name], headings[name], rows)
            problems += wrong
    families = [str(value) for value in columns.get("family", [ONLY_FAMILY] * len(rows))]
    problems += _name_problems(families, headings.get("family", "family"), rows)
    _raise_if_any(source, problems)
    derived = next((name for name in _SIZES if name not in numbers), "")
    if derived:
        numbers[derived] = _third(derived, numbers)
        _raise_if_any(source, _out_of_range(derived, numbers[derived], rows))
    loss, N, D, C = (numbers[name] for name in ("loss", *_SIZES))
    return Points(loss, N, D, C, tuple(families), rows, derived)


def _numbers(
    values: Sequence[Any], heading: str, rows: Sequence[int]
) -> tuple[Array, list[Problem]]:
    numbers, problems = np.ones(len(values)), []
    for place, value in enumerate(values):
        try:
            numbers[place] = number = float(value)
            reason = "is not above 0" if math.isfinite(number) else "is not finite"
            is_wrong = not 0 < number < math.inf
        except (TypeError, ValueError):
            reason, is_wrong = "is not a number", True
        if is_wrong:
            key, remedy = f"row {rows[place]}, column {heading}", "correct it, or cut the row"
            problems.append(Problem(key, _shown(value), reason, remedy))
    return numbers, problems


def _name_problems(families: Sequence[str], heading: str, rows: Sequence[int]) -> list[Problem]:
    reason = f"is empty, longer than {_LONGEST_NAME} characters, or has some that do not print"
    return [
        Problem(f"row {row}, column {heading}", _shown(name), reason, "write a short name")
        for row, name in zip(rows, families, strict=True)
        if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable()
    ]


def _third(name: str, numbers: Mapping[str, Array]) -> Array:
    """Return the quantity that is not given, by C = 6ND."""
    with np.errstate(over="ignore", under="ignore"):
        if name == "C":
            return np.asarray(_FLOPS_PER_PARAMETER_AND_TOKEN * numbers["N"] * numbers["D"])
        other = numbers["D" if name == "N" else "N"]
        return np.asarray(numbers["C"] / _FLOPS_PER_PARAMETER_AND_TOKEN / other)


def _out_of_range(name: str, values: Array, rows: Sequence[int]) -> list[Problem]:
    reason = "by C = 6ND is not finite and above 0"
    return [
        Problem(f"row {row}, {name}", value, reason, "correct the row")
        for row, value in zip(rows, values, strict=True)
        if not 0 < value < math.inf
    ]


def _shown(value: object) -> str:
    """Return a value as text that is short and harmless on a terminal."""
    text = str(value)
    text = text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
    return text if text.isprintable() and text else ascii(text)


def _raise_if_any(source: str, problems: Sequence[Problem]) -> None:
    if problems:
        more = len(problems) - _NUM_SHOWN
        lines = [f"  - {problem}" for problem in problems[:_NUM_SHOWN]]
        lines += [f"  and {more} more"] if more > 0 else []
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise DataError("\n".join([f"{source}: {count}:", *lines]))
