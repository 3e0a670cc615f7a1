"""The base of callbacks that act between optimizer steps."""

from __future__ import annotations

from typing import Any

import lightning as L

from modtrain.training.module import LanguageModule


class StepCallback(L.Callback):
    """Calls `on_step_end` once an optimizer step, whatever the accumulation."""

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Act after optimizer step ``step``, counted from 1."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Call `on_step_end` after the last micro-batch of a step."""
        *_, batch_idx = args
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, language_module(pl_module), trainer.global_step)


def language_module(module: L.LightningModule) -> LanguageModule:
    """Return ``module`` as the only kind of module that these callbacks work with."""
    if not isinstance(module, LanguageModule):
        raise TypeError("these callbacks need a LanguageModule")
    return module
