"""TensorBoard's HPARAMS page: a row for each run.

Written as TensorBoard's own messages. A run is a session whose group is its name, so that a run
that was resumed is one row. Its metrics are its own scalars. TensorBoard takes the columns from one
declaration below its directory: that of a sweep, or else of a run, which all have the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from modtrain.training.config import TrainConfig
from modtrain.training.metric_names import CAUSAL_LOSS, TOP_K_LOSS
from modtrain.training.plan import TrainingPlan, forward_flops_per_token
from modtrain.training.run_directory import RunDirectory, dotted_values
from modtrain.training.tensorboard.tags import MAIN_TAGS

_SUFFIX = ".hparams"
_DECLARED = f"events.out.*{_SUFFIX}"
TRAINING_FLOPS = "training TFLOPs"
FORWARD_FLOPS = "forward FLOPs a token"
_FIRST_COLUMNS = ("model.pattern", "model.capacity", "model.num_layers", "optimizer.lr", "seed")
_COLUMNS = (
    *_FIRST_COLUMNS,
    *("model.d_model", "optimizer.name", "batch.tokens", TRAINING_FLOPS, FORWARD_FLOPS),
)
_METRICS = {
    CAUSAL_LOSS: "causal loss, held out",
    TOP_K_LOSS: "top-k loss, held out (not causal)",
    "loss": "training loss",
    "throughput/tokens_per_second": "tokens/s",
}
# Of the configuration, what says where a run is, and not what it is.
_NOT_COMPARED = ("name", "runs_dir", "log.", "checkpoint.", "resume", "data.path")


def declare(directory: Path, keys: Iterable[str]) -> None:
    """Declare the table of the runs below ``directory``, in place of an earlier declaration.

    keys: of the configuration that differ between them; they come first.
    """
    directory = directory / "tensorboard"
    old = list(directory.glob(_DECLARED))
    directory.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(directory), filename_suffix=_SUFFIX)
    writer.add_event(Event(step=0, summary=_columns(keys)))
    writer.close()
    for path in old:
        path.unlink()


def session_start(run: RunDirectory, config: TrainConfig, plan: TrainingPlan) -> list[Summary]:
    """Return the summaries that add a run to the table.

    It declares the table itself unless it belongs to a sweep, which has declared it.
    """
    values = {
        key: _as_hparam(value)
        for key, value in dotted_values(config).items()
        if value is not None and not key.startswith(_NOT_COMPARED)
    }
    values[TRAINING_FLOPS] = plan.flops / 1e12
    values[FORWARD_FLOPS] = forward_flops_per_token(config)
    made = summary_v2.hparams_pb(values, trial_id=str(config.name))
    # TensorFlow's class where that is installed.
    session = Summary.FromString(made.SerializeToString())
    is_declared = any((run.path.parent / "tensorboard").glob(_DECLARED))
    return [session] if is_declared else [_columns([]), session]


def session_end() -> Summary:
    """Return the summary that marks a run in the table as complete."""
    # TensorBoard's own function for this needs TensorFlow.
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    return _summary(metadata.SESSION_END_INFO_TAG, data)


def _columns(keys: Iterable[str]) -> Summary:
    """Return the declaration of the columns: ``keys`` and those that every table has."""
    known = dotted_values(TrainConfig())
    # A group such as ``model=tiny`` has no value of its own: what it sets is in the other columns.
    swept = [key for key in (text.lstrip("+") for text in keys) if key in known]
    # The page shows the first five at once, those that differ before the others.
    first = swept or _FIRST_COLUMNS
    columns = dict.fromkeys([*sorted(first), *_COLUMNS])
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=key, differs=key in first) for key in columns],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=MAIN_TAGS[metric]), display_name=shown)
            for metric, shown in _METRICS.items()
        ],
    )
    data = plugin_data_pb2.HParamsPluginData(experiment=experiment)
    return _summary(metadata.EXPERIMENT_TAG, data)


def _summary(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary:
    """Return the message as TensorBoard stores it: in the metadata of an empty tensor."""
    stored = metadata.create_summary_metadata(data)
    value = Summary.Value(tag=tag, metadata=stored, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def _as_hparam(value: Any) -> float | str | bool:
    # The page has numbers, texts and truth values.
    return value if isinstance(value, bool | int | float | str) else str(value)
