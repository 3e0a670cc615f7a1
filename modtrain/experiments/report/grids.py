"""IsoFLOP grids among the runs, and the scaling law of their points."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_text
from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.fit import fit_points
from modtrain.experiments.fit.points import Points, read_points
from modtrain.experiments.fit.results import Fit
from modtrain.experiments.isoflop.config import CONVENTIONS
from modtrain.experiments.report.files import printable, read_each
from modtrain.experiments.report.runs import Run

_FILE = "points.csv"


@dataclass(frozen=True)
class GridFile:
    """The points of a grid. runs, trunks: by row of the file. parameters: what N counts."""

    name: str
    path: Path
    points: Points
    runs: Mapping[int, str]
    trunks: Mapping[int, str]
    parameters: str | None

    @property
    def series(self) -> dict[str, str]:
        """The name of its family for each run."""
        pairs = zip(self.points.rows, self.points.families, strict=True)
        return {self.runs[row]: printable(f"{self.name}: {family}") for row, family in pairs}


@dataclass(frozen=True)
class Grid:
    """A grid's points that are runs of the report, and their fit. reason: why there is none.

    notes: what has to be known of the points.
    """

    name: str
    points: Points
    parameters: str | None
    fit: Fit | None
    reason: str
    notes: list[str] = field(default_factory=list)


def read_grids(
    root: Path, directories: Sequence[Path], max_bytes: int
) -> tuple[list[GridFile], list[str]]:
    """Return the grids in ``directories`` below ``root``, and what is wrong with others."""

    def parse(name: str, directory: Path, path: Path) -> GridFile:
        columns = _columns(read_text(path, max_bytes))
        points = read_points(path, FitConfig(max_bytes=max_bytes))
        return GridFile(name, directory, points, *columns)

    return read_each(root, directories, "grid", _FILE, parse)


def _columns(text: str) -> tuple[dict[int, str], dict[int, str], str | None]:
    """Return the names of the run and of its trunk in each row, and what N counts.

    Raises:
        UnreadableError: the file has no runs.
    """
    headings, *lines = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    if "run" not in headings or "family" not in headings:
        raise UnreadableError(f"{_FILE} lacks the columns run and family")
    rows = {
        row: dict(zip(headings, cells, strict=False)) for row, cells in enumerate(lines, 2) if cells
    }
    counted = (name for name in CONVENTIONS if f"N_{name}" in headings)
    same = (
        name for name in counted if all(r.get("N") == r.get(f"N_{name}") for r in rows.values())
    )
    names = [{row: cells.get(key, "") for row, cells in rows.items()} for key in ("run", "trunk")]
    return names[0], names[1], next(same, None)


def fit_grid(file: GridFile, runs: Sequence[Run], bootstrap_samples: int) -> Grid | None:
    """Fit the points of ``file`` that are among ``runs``; None if there is none."""
    names = {str(r.config.get("name")) for r in runs if r.path.is_relative_to(file.path)}
    keep = np.array([file.runs.get(row) in names for row in file.points.rows], dtype=bool)
    if not keep.any():
        return None
    points = file.points.select(keep)
    families = list(dict.fromkeys(points.families))
    config = FitConfig(
        baseline="dense" if "dense" in families else families[0],
        parameters=file.parameters,
        bootstrap_samples=bootstrap_samples,
    )
    trunks = [trunk for row in points.rows if (trunk := file.trunks.get(row))]
    notes = []
    if trunks:
        notes.append(
            f"{len(trunks)} points are branches of {len(set(trunks))} trunks: those of one share"
            " its training, and their errors (branch.run in the table of runs)."
        )
    shared = file.name, points, file.parameters
    try:
        return Grid(*shared, fit_points(points, config), "", notes)
    except DataError as error:
        return Grid(*shared, None, str(error), notes)
