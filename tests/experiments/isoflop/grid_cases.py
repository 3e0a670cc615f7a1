"""Small isoFLOP grids that the tests of this folder share."""

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path

from modtrain.cli.compose_verbs import compose_isoflop
from modtrain.common.errors import raise_if_any
from modtrain.experiments.isoflop.grid import make_grid
from modtrain.experiments.isoflop.isoflop import Isoflop
from tests.helpers.problems import problems_of

FAMILIES = '{dense: ["model.pattern=dense"], mod: [], mode: ["model.experts.count=4"]}'
WITHOUT_DATA = ("data.seq_len=64", "model.vocab_size=300", "plan_only=true")
RUNNING = (
    *("model=tiny", "batch.tokens=256", "batch.micro_batch_size=2", "batch_rule.exponent=0"),
    *("shape.aspect_min=4", "shape.aspect_max=16", "model.num_heads=4", "lr_rule.width=32"),
)


DENSE, MOD = 'dense: ["model.pattern=dense"]', "mod: []"


def grid_arguments(tiny, *more, families=f"{{{DENSE}, {MOD}}}", name="g"):
    """The command of a grid whose points take about a second each."""
    shared = [o for o in tiny if not o.startswith(("budget", "batch", "model="))]
    grid = (f"name={name}", f"families={families}", "budgets=[6e8]", "sizes=[0.5,1,2]")
    return ["isoflop", *grid, "tokens_per_parameter=0.3", *RUNNING, *shared, *more]


def points_of(name):
    """The lines of a grid's ``points.csv``."""
    with (Path("runs") / name / "points.csv").open() as file:
        return list(csv.DictReader(file))


def problems_of_grid(config):
    """What a configuration finds wrong with itself, but for the data."""
    return problems_of(raise_if_any, config.problems())


@cache
def composed(*overrides: str) -> Isoflop:
    return compose_isoflop(
        ["name=g", *RUNNING, *WITHOUT_DATA, f"families={FAMILIES}", "budgets=[1e10]", *overrides]
    )


def grid_of(families=None, **changes):
    """The grid of `composed`, with other families and values of its own configuration."""
    request = composed()
    if families is None:
        families = request.families
    return make_grid(replace(request.config, **changes), families, request.defaults)


def family_of(name="mod", part="model", **changes):
    """One of the families of `composed`, with other values in a part of its configuration."""
    base = composed().families[name]
    return replace(base, **{part: replace(getattr(base, part), **changes)})
