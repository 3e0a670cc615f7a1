import pytest

from modtrain.evaluation.held_out import Decision, HeldOut
from modtrain.evaluation.router_health import health_warnings, zeroed_losses
from modtrain.models.config import ModelConfig

LABELS = ["layer_01", "layer_03"]


def test_a_router_that_is_off_or_has_a_negative_gate_is_named():
    healthy = {
        "router/layer_01/gate_mean": 0.5,
        "router/layer_01/update_ratio": 0.2,
        "held_out/layer_01/worth": 0.02,
    }
    assert health_warnings(LABELS, healthy) == {}
    sick = {
        "router/layer_03/gate_mean": -0.02,
        "router/layer_03/update_ratio": 0.004,
        "held_out/layer_03/worth": 0.0004,
    }
    warnings = health_warnings(LABELS, healthy | sick)
    assert list(warnings) == ["layer_03 gate", "layer_03 update", "layer_03 worth"]
    assert all("router layer_03" in text for text in warnings.values())
    assert "-0.020" in warnings["layer_03 gate"]
    assert "0.40% of the residual stream" in warnings["layer_03 update"]
    assert "+0.04%" in warnings["layer_03 worth"]


def test_the_worth_of_a_router_is_the_change_of_the_loss_without_it():
    losses = {(0,): 2.1, (1,): 2.0, None: 2.5}
    base = HeldOut(1, 1.0, {"predictor": Decision(2.0, 1.0)})

    def evaluate_with(swap):
        assert swap.choice == "zero"
        return HeldOut(1, 1.0, {"predictor": Decision(losses[swap.routers], 1.0)})

    worth = zeroed_losses(ModelConfig(num_layers=4), base, evaluate_with)
    assert worth == {
        "held_out/layer_01/worth": pytest.approx(0.05),
        "held_out/layer_03/worth": pytest.approx(0),
        "held_out/routed_worth": pytest.approx(0.25),
    }
    assert zeroed_losses(ModelConfig(pattern="dense"), base, evaluate_with) == {}
