"""The arrangement of TensorBoard's custom scalars, against the tags that a run writes."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from modtrain.cli.compose import compose
from modtrain.models.config import ModelConfig
from modtrain.training.run import train
from modtrain.training.tensorboard.layout import tensorboard_layout


def test_only_what_the_model_has_is_in_the_layout():
    dense = ModelConfig(num_layers=2, pattern="dense")
    assert list(tensorboard_layout(dense, "GFLOPs")) == ["losses", "throughput"]
    routed = ModelConfig(num_layers=2)
    routed.experts.count = 2
    categories = [
        *("losses", "routers over all layers", "routers by layer"),
        *("experts by layer", "throughput"),
    ]
    assert list(tensorboard_layout(routed, "GFLOPs")) == categories


@pytest.mark.slow
def test_every_chart_has_tags_of_a_run(tiny, tmp_path):
    overrides = [*tiny, f"runs_dir={tmp_path}", "name=a", "model.experts.count=2"]
    train(compose("train", [*overrides, "log.progress=false"]))
    events = EventAccumulator(str(tmp_path / "a/tensorboard")).Reload()
    (stored,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(stored.tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    for category in layout.category:
        for chart in category.chart:
            for series in chart.margin.series:
                assert {series.value, series.lower, series.upper} <= set(tags)
            for pattern in chart.multiline.tag:
                matching = [tag for tag in tags if re.match(pattern, tag)]
                # The peak of a CPU is not known.
                if chart.title == "MFU":
                    continue
                is_by_layer = "by layer" in category.title and "layer_" in pattern
                assert len(matching) > is_by_layer, pattern
