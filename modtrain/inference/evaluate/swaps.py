"""`modtrain eval swap=true`: what the routers of a run are worth."""

from __future__ import annotations

from typing import Any

from modtrain.evaluation.router_worth import router_worth
from modtrain.inference.calibration import resolve_decisions
from modtrain.inference.config import EvalRunConfig
from modtrain.inference.loading import LoadedRun
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterSwap, Selection

ALL_ROUTERS = "all"


def swaps_of(model: ModelConfig, selection: Selection) -> list[RouterSwap]:
    """Return the swaps for all routers at once, then each router's updates zeroed by themselves."""
    has_content = model.router.needs_causal
    gates = [False] if model.router.gate_kind == "none" else [False, True]
    # Scores that ignore content have no lowest ones, and nothing to shuffle.
    selected = ("random", "even", "lowest") if has_content else ("random", "even")
    swaps = [RouterSwap("zero")]
    swaps += [RouterSwap(name, mean) for name in selected for mean in gates]
    if has_content:
        swaps.append(RouterSwap("shuffled"))
    if "predictor" in model.router.causal_routers and selection != "predictor":
        swaps.append(RouterSwap("predictor"))
    swaps.append(RouterSwap("update_norm"))
    numbers = range(len(model.routed_parts))
    return swaps + [RouterSwap("zero", routers=(number,)) for number in numbers if len(numbers) > 1]


def evaluate_swaps(config: EvalRunConfig, loaded: LoadedRun) -> dict[str, Any]:
    """Evaluate the run's first causal decision under each swap.

    Returns:
        ``decision``, ``sequences``, ``loss`` of the routers' own choice, and ``swaps``: a mapping
        each, with ``choice``, ``gate`` (own or mean), ``router`` (all, or one's label), ``loss``,
        its relative ``change``, and the 95% interval ``low``, ``high`` of that over sequences.
    """
    model = loaded.trained.model
    selection = resolve_decisions(config.inference, model)[0]
    worth = router_worth(
        loaded.model,
        loaded.held_out(config.sequences, config.batch_size),
        loaded.autocast(),
        selection,
        swaps_of(model, selection),
        capacities=loaded.capacities,
    )
    labels = model.routed_labels
    rows = [
        {
            "choice": swap.choice,
            "gate": "mean" if swap.mean_gate else "own",
            "router": ALL_ROUTERS if swap.routers is None else labels[swap.routers[0]],
            **vars(result),
        }
        for swap, result in worth.swaps.items()
    ]
    return {
        "decision": selection,
        "sequences": worth.num_sequences,
        "loss": worth.loss,
        "swaps": rows,
    }
