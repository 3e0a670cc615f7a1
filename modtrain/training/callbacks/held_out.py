"""Evaluates on held-out text at intervals."""

from __future__ import annotations

import lightning as L
import torch

from modtrain.training.callbacks.metrics import StepClock
from modtrain.training.callbacks.step import StepCallback, is_due
from modtrain.training.held_out import HeldOut, evaluate
from modtrain.training.metrics_log import MetricsLog
from modtrain.training.module import LanguageModule
from modtrain.training.routing_statistics import chosen_picture

CAUSAL_LOSS = "held_out/causal_loss"
TOP_K_LOSS = "held_out/top_k_loss (not causal)"
CAUSAL_FLOPS = "held_out/causal_flops_per_token"


class HeldOutCallback(StepCallback):
    """Records the causal loss, and beside it the top-k loss, which is not causal."""

    def __init__(self, metrics_log: MetricsLog, clock: StepClock, every: int | None) -> None:
        self.metrics_log, self.clock, self.every = metrics_log, clock, every

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Evaluate where it is due."""
        if not is_due(step, self.every, module.plan.steps):
            return
        with self.clock:
            loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            found = evaluate(module.model, loader, trainer.precision_plugin.forward_context())
            self.metrics_log.write(step, held_out_metrics(found))
            self._draw(trainer, module, step)

    def _draw(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Show which tokens of the first held-out sequence each routed layer takes."""
        if not module.model.routed_layers:
            return
        batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            output = module.model(batch[:1, :-1].to(module.device))
        self.metrics_log.picture(
            step, "router/chosen (layer x position)", chosen_picture(output.routing)
        )


def held_out_metrics(held_out: HeldOut) -> dict[str, float]:
    """Flatten the figures for the metrics; a dense model has one loss, which is causal."""
    values: dict[str, float] = {}
    if held_out.causal_loss is not None:
        values[CAUSAL_LOSS] = held_out.causal_loss
    if held_out.top_k_loss is not None:
        values[TOP_K_LOSS] = held_out.top_k_loss
        if held_out.causal_flops is not None:
            values[CAUSAL_FLOPS] = held_out.causal_flops
    for layer, share in held_out.realised_capacity.items():
        values[f"held_out/layer_{layer:02d}/realised_capacity"] = share
    for layer, scores in held_out.predictor.items():
        for name in ("accuracy", "f1", "balanced_accuracy"):
            values[f"held_out/layer_{layer:02d}/predictor_{name}"] = getattr(scores, name)
    return values
