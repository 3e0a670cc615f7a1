"""The tags of a run's metrics: the main group comes first, and layers are summarised."""

import pytest

from modtrain.training.tensorboard.tags import (
    EVALUATION,
    TASKS,
    flops_unit,
    tags_by_axis,
    tags_by_step,
)

RECORD = {
    "loss": 3.0,
    "lr": 0.1,
    "grad_norm": 1.0,
    "balance_loss": 0.5,
    "held_out/causal_loss": 3.5,
    "held_out/top_k_loss (not causal)": 3.25,
    "held_out/layer_01/worth": 0.25,
    "experts/layer_00/load_max": 2.0,
    "router/layer_01/gate_mean": -0.5,
    "router/layer_03_mlp/gate_mean": 1.5,
    "router/layer_03_mlp/score_std": 2.0,
    "throughput/mfu": 0.4,
    "throughput/step_seconds": 0.1,
}


def test_the_main_group_comes_first_and_has_each_of_its_values_once():
    scalars = tags_by_step(RECORD, 0.25)
    main = {tag: value for tag, value in scalars.items() if tag.startswith("main/")}
    assert main == {
        "main/loss": 3.0,
        "main/causal_loss": 3.5,
        "main/top_k_loss_not_causal": 3.25,
        "main/gap": 0.25,
        "main/mfu": 0.4,
        "main/share_of_budget": 0.25,
    }
    others = scalars.keys() - main.keys()
    others_there = {*others, EVALUATION, TASKS}
    assert all(tag > "main by" and "/" in tag for tag in others_there)
    # No metric is lost, and none is under two tags.
    summaries = {tag for tag in others if "/all_layers/" in tag}
    assert len(others - summaries) == len(RECORD) - 4


def test_layers_are_summarised_beside_the_details():
    scalars = tags_by_step(RECORD, 0.0)
    assert scalars["router/layer_01/gate_mean"] == -0.5
    summary = "router/all_layers/gate_mean"
    assert [scalars[summary + end] for end in ("", "_min", "_max")] == [0.5, -0.5, 1.5]
    assert scalars["router/all_layers/score_std"] == 2.0
    assert scalars["validation/all_layers/worth"] == 0.25
    assert scalars["moe/all_layers/load_max"] == 2.0


def test_losses_have_other_axes_too():
    assert tags_by_axis(RECORD, "GFLOPs") == {
        "main_by_GFLOPs/loss": 3.0,
        "main_by_GFLOPs/causal_loss": 3.5,
        "main_by_GFLOPs/top_k_loss_not_causal": 3.25,
    }


@pytest.mark.parametrize("exponent", [8, 10, 12, 14, 16, 18, 20, 25])
def test_a_unit_has_a_hundred_points_of_a_run_and_fits(exponent):
    flops = 10.0**exponent
    _, size = flops_unit(flops)
    # A hundred points, and an integer of 64 bits.
    assert 100 <= flops / size < 2**63
