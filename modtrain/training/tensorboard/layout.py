"""How TensorBoard's page of custom scalars is arranged: losses, routers, experts, throughput."""

from __future__ import annotations

import re

from modtrain.models.config import ModelConfig
from modtrain.training.tensorboard.tags import GAP, MAIN_TAGS, SHARE_OF_BUDGET, tag_of

Layout = dict[str, dict[str, list[str | list[str]]]]
_LABEL = r"layer_[^/]+"


def tensorboard_layout(model: ModelConfig, flops_axis: str) -> Layout:
    """Return the charts by category, as ``SummaryWriter.add_custom_scalars`` takes them.

    A chart of routers or experts has a line for each layer, or a mean within its range over the
    layers. Tags are regular expressions. flops_axis: see `flops_unit`.
    """
    losses = [tag_of(name) for name in MAIN_TAGS if "loss" in name]
    by_flops = [tag.replace("main/", f"main_by_{flops_axis}/") for tag in losses]
    layout = {
        "losses": {
            "loss": _named(*losses),
            f"loss by {flops_axis}": _named(*by_flops),
            "learning rate": _chart(r"training/lr(_[^/]+)?"),
            "norm of the gradient": _named("training/grad_norm"),
        }
    }
    if model.is_routed:
        layout["losses"]["causal loss - top-k loss"] = _named(GAP)
        layout["routers over all layers"] = {
            "mean gate of the routed tokens": _range("router/all_layers/gate_mean"),
            "updates over the residual stream": _range("router/all_layers/update_ratio"),
            "share of tokens, training": _range("router/all_layers/chosen"),
        }
        layout["routers by layer"] = {
            "mean gate of the routed tokens": _chart(f"router/{_LABEL}/gate_mean"),
            "updates over the residual stream": _chart(f"router/{_LABEL}/update_ratio"),
            "loss without the layer": _chart(
                f"validation/{_LABEL}/worth", "validation/routed_worth"
            ),
            "share of tokens, training": _chart(f"router/{_LABEL}/chosen"),
            "share of tokens, causal": _chart(f"validation/{_LABEL}/realised_capacity_[^/]+"),
            "scores": _chart(f"router/{_LABEL}/score_mean"),
        }
    if model.expert_labels:
        layout["experts by layer"] = {
            "largest load over an even one": _chart(f"moe/{_LABEL}/load_max"),
            "entropy of the loads": _chart(f"moe/{_LABEL}/load_entropy"),
            "share of dropped choices": _chart(f"moe/{_LABEL}/dropped"),
        }
    layout["throughput"] = {
        "tokens a second": _named("main/tokens_per_second"),
        "seconds a step": _named("throughput/step_seconds"),
        "MFU": _named("main/mfu"),
        "share of the budget": _named(SHARE_OF_BUDGET),
    }
    return layout


def _named(*tags: str) -> list[str | list[str]]:
    return _chart(*map(re.escape, tags))


def _chart(*patterns: str) -> list[str | list[str]]:
    return ["Multiline", [f"^{pattern}$" for pattern in patterns]]


def _range(tag: str) -> list[str | list[str]]:
    return ["Margin", [tag, f"{tag}_min", f"{tag}_max"]]
