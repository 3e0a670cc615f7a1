"""The typed configuration of each verb, imported when asked for. Imports nothing heavy."""

from __future__ import annotations

import functools
import pkgutil

_SCHEMAS = {
    "train": "modtrain.training.config:TrainConfig",
    "plan": "modtrain.training.config:PlanConfig",
    "compare": "modtrain.experiments.compare.config:CompareConfig",
    "isoflop": "modtrain.experiments.isoflop.config:IsoflopConfig",
    "prepare": "modtrain.data.config:PrepareConfig",
    "eval": "modtrain.inference.config:EvalRunConfig",
    "generate": "modtrain.inference.config:GenerateConfig",
    "inspect": "modtrain.inference.config:InspectConfig",
    "export": "modtrain.interop.config:ExportConfig",
    "import": "modtrain.interop.config:ImportConfig",
    "checkpoints": "modtrain.checkpoint.config:CheckpointsConfig",
    "data": "modtrain.inference.data_view.config:DataViewConfig",
    "submit": "modtrain.cluster.config:SubmitConfig",
    "search": "modtrain.experiments.search.config:SearchConfig",
    "search-patterns": "modtrain.experiments.pattern_search.config:PatternSearchConfig",
    "fit": "modtrain.experiments.fit.config:FitConfig",
    "report": "modtrain.experiments.report.config:ReportConfig",
    "status": "modtrain.cluster.config:StatusConfig",
    "logs": "modtrain.cluster.config:LogsConfig",
    "cancel": "modtrain.cluster.config:CancelConfig",
    "wait": "modtrain.cluster.config:WaitConfig",
}
VERBS = tuple(_SCHEMAS)
"""The verbs that have a configuration."""
SUBMITTED = (
    *("train", "prepare", "eval", "compare", "isoflop", "search", "search-patterns"),
    "debug",
)
"""The verbs that a job can run, and ``debug``, which keeps nodes for interactive use."""


@functools.cache
def schema_of(verb: str) -> type:
    """Return the dataclass of a verb's configuration; KeyError for one that has none."""
    schema: type = pkgutil.resolve_name(_SCHEMAS[verb])
    return schema
