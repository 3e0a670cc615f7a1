"""The best candidate as a configuration file, to train as it is."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from modtrain.common.atomic_io import write_text
from modtrain.common.renamed_keys import flatten
from modtrain.experiments.pattern_search.results import Outcome
from modtrain.training.config import BranchConfig, TrainConfig


def write_best(outcome: Outcome, defaults: TrainConfig, name: str, path: Path) -> None:
    """Write a file of the group ``experiment`` that trains the candidate from the start.

    outcome: of the candidate's last run. defaults: the training configuration without overrides;
    the file has what differs from it. name: of the run.
    """
    config = replace(outcome.run.config, name=name, branch=BranchConfig())
    before, after = flatten(asdict(defaults)), flatten(asdict(config))
    nested: dict[str, Any] = {}
    for key, value in after.items():
        if key not in before or before[key] != value:
            *sections, last = key.split(".")
            node = nested
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = value
    header = (
        "# @package _global_\n"
        f"# The pattern of {outcome.run.name}, found by modtrain search-patterns: held-out causal"
        f" loss {outcome.loss:.4f},\n# {outcome.forward_flops:.4g} forward FLOPs a token,"
        f" {outcome.run.plan.flops:.4g} training FLOPs.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        path, header + yaml.safe_dump(nested, sort_keys=False, width=96, default_flow_style=None)
    )
