"""Acts on detected loss spikes as the configuration says."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import lightning as L

from modtrain.common.errors import CheckpointError
from modtrain.training.callbacks.guard import Guard
from modtrain.training.config import TrainConfig
from modtrain.training.metrics_log import MetricsLog
from modtrain.training.module import LanguageModule
from modtrain.training.schedules import is_due
from modtrain.training.spikes.detector import Spike, SpikeReport
from modtrain.training.spikes.journal import RollBackError, SpikeJournal


@dataclass(eq=False)
class SpikeGuard(Guard):
    """Reads the module's spike detector, and stops the run, reports a skip, or rolls back.

    The detector has skipped every step since a spike that halts.

    print_message: shows a text to the user, on one rank.
    """

    journal: SpikeJournal
    metrics_log: MetricsLog
    print_message: Callable[[str], None]

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Check when something is due; add the figures to a record."""
        if self.is_check_due(trainer, module, step):
            report = self.check(module)
            if is_due(step, self.intervals[0], module.plan.steps):
                self.metrics_log.write(step, self._figures(report))

    def check(self, module: LanguageModule) -> SpikeReport:
        """Act on the steps since the last check; collective.

        Raises:
            TrainingError: the run has to stop. Names the step, its samples, and the checkpoint to
                resume from.
            RollBackError: it has to roll back.
        """
        if module.spikes is None:
            raise RuntimeError("a SpikeGuard needs a module that detects spikes")
        report = module.spikes.detector.take_report()
        limit = module.config.spike.max_in_a_row
        for spike in report.spikes:
            samples = self.data.sample_numbers(spike.step - 1)
            if spike.halts:
                self._halt(module.config, spike, samples)
            self.journal.write("skip", spike, samples)
            self.print_message(f"{spike.description}: skipped, {limit} in a row at most")
        # The sums do not have what the skipped steps added.
        module.statistics.count -= len(report.spikes) * module.plan.accumulate
        return report

    def _halt(self, run_config: TrainConfig, spike: Spike, samples: list[int]) -> None:
        config = run_config.spike
        if config.action == "roll_back" and self.journal.rollbacks < config.max_rollbacks:
            with suppress(CheckpointError):
                self.checkpointer.wait()
            raise RollBackError(spike, samples)
        self.journal.write("stop", spike, samples)
        limit = ""
        if config.action == "skip":
            limit = f", after {config.max_in_a_row} skipped in a row (spike.max_in_a_row)"
        if config.action == "roll_back":
            limit = f", after {self.journal.rollbacks} roll backs (spike.max_rollbacks)"
        reason = f"{spike.description}{self._bad_ranks(spike)}{limit}"
        first_bad = spike.step - (config.max_in_a_row if config.action == "skip" else 0)
        raise self.stop_error(
            run_config, reason, samples, first_bad=first_bad, is_finite=spike.is_finite
        )

    def _bad_ranks(self, spike: Spike) -> str:
        """Name the ranks whose own loss is not finite, if only some are."""
        is_bad = [not math.isfinite(loss) for loss in self.ranks.all_gather_object(spike.own_loss)]
        if not any(is_bad) or all(is_bad):
            return ""
        return f" on rank {', '.join(str(rank) for rank, bad in enumerate(is_bad) if bad)}"

    def _figures(self, report: SpikeReport) -> dict[str, float]:
        values: dict[str, float] = {
            "spike/skipped": report.num_skipped,
            "spike/rollbacks": self.journal.rollbacks,
        }
        if report.last is not None:
            for name in ("loss", "grad_norm", "loss_limit", "grad_norm_limit"):
                values[f"spike/{name}"] = getattr(report.last, name)
        # JSON has no infinity, which is the limit during the warm-up.
        return {name: value for name, value in values.items() if math.isfinite(value)}
