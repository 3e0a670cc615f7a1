"""How TensorBoard's page of custom scalars is arranged: losses, routers, experts, throughput."""

from __future__ import annotations

import re

from modtrain.models.config import ModelConfig

Layout = dict[str, dict[str, list[str | list[str]]]]
_LABEL = r"layer_[^/]+"


def tensorboard_layout(model: ModelConfig) -> Layout:
    """Return the charts by category, as ``SummaryWriter.add_custom_scalars`` takes them.

    A chart of routers or experts has a line for each layer. Tags are regular expressions.
    """
    layout = {
        "losses": {
            "loss": _named("loss", "held_out/causal_loss", "held_out/top_k_loss (not causal)"),
            "learning rate": _chart(r"lr(_[^/]+)?"),
            "norm of the gradient": _named("grad_norm"),
        }
    }
    if model.is_routed:
        layout["routers by layer"] = {
            "mean gate of the routed tokens": _chart(f"router/{_LABEL}/gate_mean"),
            "updates over the residual stream": _chart(f"router/{_LABEL}/update_ratio"),
            "loss without the layer": _chart(f"held_out/{_LABEL}/worth", "held_out/routed_worth"),
            "share of tokens, training": _chart(f"router/{_LABEL}/chosen"),
            "share of tokens, causal": _chart(f"held_out/{_LABEL}/realised_capacity_[^/]+"),
            "scores": _chart(f"router/{_LABEL}/score_mean"),
        }
    if model.expert_labels:
        layout["experts by layer"] = {
            "largest load over an even one": _chart(f"experts/{_LABEL}/load_max"),
            "entropy of the loads": _chart(f"experts/{_LABEL}/load_entropy"),
            "share of dropped choices": _chart(f"experts/{_LABEL}/dropped"),
        }
    layout["throughput"] = {
        "tokens a second": _named("throughput/tokens_per_second"),
        "seconds a step": _named("throughput/step_seconds"),
        "MFU": _named("throughput/mfu"),
    }
    return layout


def _named(*tags: str) -> list[str | list[str]]:
    return _chart(*map(re.escape, tags))


def _chart(*patterns: str) -> list[str | list[str]]:
    return ["Multiline", [f"^{pattern}$" for pattern in patterns]]
