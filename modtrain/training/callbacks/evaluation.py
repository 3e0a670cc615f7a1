"""Evaluates on held-out data at intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from modtrain.data.stream.batch import Batch
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import Ranks
from modtrain.distributed.watchdog import Watchdog
from modtrain.evaluation.held_out import HeldOut, Part, evaluate
from modtrain.evaluation.router_health import health_warnings, zeroed_losses
from modtrain.models.depth.config import RouterSwap, Selection
from modtrain.training.callbacks.metrics import StepClock
from modtrain.training.callbacks.step import StepCallback
from modtrain.training.metric_names import CAUSAL_FLOPS, CAUSAL_LOSS, TOP_K_LOSS
from modtrain.training.metrics_log import MetricsLog
from modtrain.training.module import LanguageModule
from modtrain.training.schedules import is_due


@dataclass(eq=False)
class HeldOutCallback(StepCallback):
    """Records the causal loss, and the top-k loss, which is not causal.

    watchdog: gets a heartbeat for each batch, because a large split may take long.
    """

    metrics_log: MetricsLog
    clock: StepClock
    every: int | None
    data: TokenDataModule
    ranks: Ranks
    watchdog: Watchdog | None

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Evaluate when it is due."""
        if not is_due(step, self.every, module.plan.steps):
            return
        with self.clock, _eager(module):
            held_out = self._evaluate(trainer, module, step)
            values = held_out_metrics(held_out)
            mode = module.config.eval.zero_routers
            if mode == "always" or (mode == "end" and step == module.plan.steps):
                first = module.config.model.causal_selections[:1]
                values |= zeroed_losses(
                    module.config.model,
                    held_out,
                    partial(self._evaluate, trainer, module, step, first),
                )
            self.metrics_log.write(step, values)
            self._add_routing(trainer, module, step)
        for text in health_warnings(module.config.model.routed_labels, values).values():
            module.print(f"warning: {text}")
        if self.watchdog is not None:
            # What follows, such as a save, has its own timeout.
            self.watchdog.heartbeat(f"the end of the evaluation after step {step}")

    def _evaluate(
        self,
        trainer: L.Trainer,
        module: LanguageModule,
        step: int,
        selections: Sequence[Selection] | None = None,
        swap: RouterSwap | None = None,
    ) -> HeldOut:
        """Evaluate; by these causal decisions alone if they are given."""
        parts = {
            name: Part(
                self._with_heartbeats(part.batches, step), self._total(module, counts=part.counts)
            )
            for name, part in self.data.valid_parts().items()
        }
        return evaluate(
            module.model,
            parts,
            trainer.precision_plugin.forward_context(),
            capacities=module.plan.capacities_at(step - 1),
            selections=selections,
            as_trained=selections is None,
            swap=swap,
        )

    def _with_heartbeats(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """Send a heartbeat for each batch."""
        for number, batch in enumerate(batches, 1):
            if self.watchdog is not None:
                self.watchdog.heartbeat(f"batch {number} of the evaluation after step {step}")
            yield batch

    def _total(self, module: LanguageModule, counts: bool) -> Callable[[Tensor], Tensor]:
        """Return the sum over ranks; ranks that read the same sequences count once.

        counts: False if this rank's sequences are a copy of another's, because there are too few:
        it computes them because a forward pass may be collective.
        """
        dims = module.plan.dims
        share = dims.data_parallel / dims.world_size

        def total(values: Tensor) -> Tensor:
            return self.ranks.sum(values if counts else torch.zeros_like(values)) * share

        return total

    def _add_routing(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Record what the routers do with the first held-out sequence; collective."""
        if not module.model.routers:
            return
        batch = next(iter(self.data.val_dataloader())).first().to(module.device)
        # Random routers draw numbers; the generators are restored for training.
        cuda = [module.device] if module.device.type == "cuda" else []
        with (
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            torch.random.fork_rng(devices=cuda),
        ):
            output = module.model(
                batch.inputs_BS,
                capacities=module.plan.capacities_at(step - 1),
                **batch.masks(),
            )
        self.metrics_log.add_routing(step, module.config.model.routed_labels, output.routing)


def _eager(module: LanguageModule) -> AbstractContextManager[Any]:
    """Return the context to evaluate in, where compiled layers run eagerly.

    Each way of routing and each batch size would be one more graph of every layer at every stage of
    the capacities, and exceed the limit of graphs. Graphs of training stay valid.
    """
    if not module.config.compile:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def held_out_metrics(held_out: HeldOut) -> dict[str, float]:
    """Flatten the figures to metrics; a model without top-k routing has causal losses only.

    The model's main way of routing has the short names, the others have names of their own.
    """
    values: dict[str, float] = {}
    if held_out.causal is not None:
        values[CAUSAL_LOSS] = held_out.causal.loss
        values[CAUSAL_FLOPS] = held_out.causal.flops
    if held_out.top_k is not None:
        values[TOP_K_LOSS] = held_out.top_k.loss
    for name, decision in held_out.decisions.items():
        if len(held_out.decisions) > 1:
            values[f"held_out/causal_loss_{name}"] = decision.loss
            values[f"held_out/causal_flops_per_token_{name}"] = decision.flops
        for label, share in decision.realised_capacity.items():
            values[f"held_out/{label}/realised_capacity_{name}"] = share
        for label, scores in decision.agreement.items():
            for figure in ("accuracy", "f1", "balanced_accuracy"):
                values[f"held_out/{label}/{name}_{figure}"] = getattr(scores, figure)
    for name, part in held_out.sources.items():
        if part.causal is not None:
            values[f"held_out/source_{name}/causal_loss"] = part.causal.loss
        if part.top_k is not None:
            values[f"held_out/source_{name}/top_k_loss (not causal)"] = part.top_k.loss
    return values
