"""Stops a run whose loss or gradient is not finite."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from modtrain.training.callbacks.guard import Guard, overflowed
from modtrain.training.module import LanguageModule


class FiniteLossGuard(Guard):
    """Records the first step with a NaN or infinite loss or gradient, on the device.

    It raises before anything that is due after such a step, so no checkpoint follows it.
    """

    # The first step with a bad loss on this rank, and with a bad loss or gradient.
    _first_bad_2: Tensor | None = None

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Record a bad step; raise if there was one and something is due."""
        statistics = module.statistics
        bad = ~torch.isfinite(statistics.total)
        bad_gradient = bad | overflowed(trainer)
        if statistics.grad_norm is not None:
            bad_gradient = bad_gradient | ~torch.isfinite(statistics.grad_norm)
        bad_2 = torch.stack([bad, bad_gradient])
        if self._first_bad_2 is None:
            self._first_bad_2 = torch.full((2,), -1, dtype=torch.long, device=bad_2.device)
        is_new_2 = bad_2 & (self._first_bad_2 < 0)
        self._first_bad_2 = torch.where(is_new_2, step, self._first_bad_2)
        if self.is_check_due(trainer, module, step):
            self.check(module)

    def check(self, module: LanguageModule) -> None:
        """Raise if a step was bad.

        Raises:
            TrainingError: names the step, its samples, and the checkpoint to go back to.
        """
        own = [-1, -1] if self._first_bad_2 is None else self._first_bad_2.tolist()
        # One rank's bad loss makes all gradients bad: they stop together, and name that rank.
        ranks = self.ranks
        if not ranks.any(own[1] >= 0):
            return
        firsts = ranks.all_gather_object(own)
        first = min(step for _, step in firsts if step >= 0)
        bad_ranks = [str(rank) for rank, (step, _) in enumerate(firsts) if step == first]
        where = f" on rank {', '.join(bad_ranks)}" if bad_ranks and ranks.world_size > 1 else ""
        reason = f"the loss or its gradient is NaN or infinite at step {first}{where}"
        raise self.stop_error(
            module.config, reason, self.data.sample_numbers(first - 1), is_finite=False
        )
