"""TensorBoard's HParams page: a row for each run, with swept keys, loss and FLOPs.

Written as TensorBoard's own messages. The experiment is declared in a folder of its own, since a
later start may sweep other keys. Each run is a session whose group is its name, so that a run which
was resumed, or written twice, is one row.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from modtrain.distributed.launch import Launch
from modtrain.experiments.sweep.jobs import read_jobs
from modtrain.models.flops import forward_flops
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory

LOSS = "held_out/causal_loss"
TRAINING_FLOPS = "training TFLOPs"
FORWARD_FLOPS = "forward FLOPs a token"
_METRICS = {
    LOSS: "held-out causal loss (nats a token)",
    TRAINING_FLOPS: "training TFLOPs, executed",
    FORWARD_FLOPS: "forward FLOPs a token, executed",
}


def forward_flops_per_token(config: TrainConfig) -> float:
    """Return the executed FLOPs of a run's forward pass per token."""
    seq_len = config.data.seq_len or 1
    return forward_flops(config.model, seq_len).total / seq_len


def write_experiment(directory: Path, keys: Iterable[str]) -> None:
    """Declare the table of the runs below ``directory``: its columns are ``keys`` and the metrics.

    Replaces the declaration of an earlier start.
    """
    message = summary_v2.hparams_config_pb(
        hparams=[summary_v2.HParam(key) for key in sorted(keys)],
        metrics=[summary_v2.Metric(tag, display_name=name) for tag, name in _METRICS.items()],
    )
    _write(directory / "tensorboard", [(0, message)])


def write_swept(run: RunDirectory) -> None:
    """Add a complete run to the table of its sweep, if it belongs to one.

    Only rank 0 writes. A run with log.tensorboard=false is skipped.
    """
    if Launch.from_environment().rank != 0:
        return
    swept = read_jobs(run.path.parent).get(run.path.name)
    if swept is not None and run.read_config().log.tensorboard:
        write_run(run, swept)


def write_run(run: RunDirectory, swept: Mapping[str, str]) -> None:
    """Add a complete run to the table, or replace its row."""
    config = run.read_config()
    result = run.read_result()
    # A TensorBoard scalar is a 32-bit float, with a maximum of about 3e38; TFLOPs read better.
    metrics = {
        LOSS: result.get(LOSS),
        TRAINING_FLOPS: result["flops"] / 1e12,
        FORWARD_FLOPS: forward_flops_per_token(config),
    }
    session = summary_v2.hparams_pb(
        {key: _value(text) for key, text in swept.items()}, trial_id=str(config.name)
    )
    end = _session_end()
    values = [
        Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        for tag, value in metrics.items()
        if value is not None
    ]
    step = result["steps"]
    _write(run.tensorboard / "hparams", [(0, session), *((step, v) for v in values), (step, end)])


def _session_end() -> Summary:
    # TensorBoard's own function for this needs TensorFlow.
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(data),
        tensor=metadata.NULL_TENSOR,
    )
    return Summary(value=[value])


def _write(directory: Path, summaries: list[tuple[int, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    old = list(directory.glob("events.out.*"))
    writer = EventFileWriter(str(directory))
    for step, content in summaries:
        writer.add_event(Event(step=step, summary=Summary.FromString(content.SerializeToString())))
    writer.close()
    for path in old:
        path.unlink()


def _value(text: str) -> float | str | bool:
    """Convert a number, so that the page sorts and plots it as one."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text
