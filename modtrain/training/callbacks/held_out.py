"""Evaluates on held-out text at intervals."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor

from modtrain.data.documents import document_numbers_if_apart
from modtrain.training.callbacks.metrics import StepClock
from modtrain.training.callbacks.step import StepCallback, is_due
from modtrain.training.held_out import HeldOut, evaluate
from modtrain.training.metrics_log import MetricsLog
from modtrain.training.module import LanguageModule
from modtrain.training.ranks import Ranks
from modtrain.training.routing_statistics import chosen_picture

CAUSAL_LOSS = "held_out/causal_loss"
TOP_K_LOSS = "held_out/top_k_loss (not causal)"
CAUSAL_FLOPS = "held_out/causal_flops_per_token"


class HeldOutCallback(StepCallback):
    """Records the causal loss, and beside it the top-k loss, which is not causal."""

    def __init__(
        self, metrics_log: MetricsLog, clock: StepClock, every: int | None, ranks: Ranks
    ) -> None:
        self.metrics_log, self.clock, self.every = metrics_log, clock, every
        self.ranks = ranks

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Evaluate where it is due."""
        if not is_due(step, self.every, module.plan.steps):
            return
        with self.clock:
            loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            found = evaluate(
                module.model,
                loader,
                trainer.precision_plugin.forward_context(),
                eos_id=module.config.data.eos_id,
                capacities=module.plan.capacities_at(step - 1),
                total=self._total(module),
            )
            self.metrics_log.write(step, held_out_metrics(found))
            self._draw(trainer, module, step)

    def _total(self, module: LanguageModule) -> Callable[[Tensor], Tensor]:
        """Return the sum over ranks, in which those that read the same sequences count once."""
        sizes = module.plan.sizes
        return lambda values: self.ranks.sum(values) * sizes.data_parallel / sizes.world_size

    def _draw(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Show which tokens of the first held-out sequence each routed layer takes."""
        if not module.model.routers:
            return
        batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
        tokens_BS = batch[:1, :-1].to(module.device)
        eos_id = module.config.data.eos_id
        documents_BS = document_numbers_if_apart(tokens_BS, eos_id)
        # Random routers draw: training is to go on as if nobody had looked.
        cuda = [module.device] if module.device.type == "cuda" else []
        with (
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            torch.random.fork_rng(devices=cuda),
        ):
            output = module.model(
                tokens_BS,
                capacities=module.plan.capacities_at(step - 1),
                documents_BS=documents_BS,
            )
        self.metrics_log.picture(
            step, "router/chosen (layer x position)", chosen_picture(output.routing)
        )


def held_out_metrics(held_out: HeldOut) -> dict[str, float]:
    """Flatten the figures for the metrics; a model that never looks ahead has causal losses alone.

    The decision that a model is judged by has the short names, others stand beside it by theirs.
    """
    values: dict[str, float] = {}
    if held_out.causal is not None:
        values[CAUSAL_LOSS] = held_out.causal.loss
        values[CAUSAL_FLOPS] = held_out.causal.flops
    if held_out.top_k_loss is not None:
        values[TOP_K_LOSS] = held_out.top_k_loss
    for name, decision in held_out.decisions.items():
        if len(held_out.decisions) > 1:
            values[f"held_out/causal_loss_{name}"] = decision.loss
            values[f"held_out/causal_flops_per_token_{name}"] = decision.flops
        for label, share in decision.realised_capacity.items():
            values[f"held_out/{label}/realised_capacity_{name}"] = share
        for label, scores in decision.agreement.items():
            for figure in ("accuracy", "f1", "balanced_accuracy"):
                values[f"held_out/{label}/{name}_{figure}"] = getattr(scores, figure)
    return values
