"""Does what the configuration says about loss spikes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import lightning as L

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.common.errors import CheckpointError
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import Ranks
from modtrain.training.callbacks.guard import Guard
from modtrain.training.callbacks.step import is_due
from modtrain.training.metrics_log import MetricsLog
from modtrain.training.module import LanguageModule
from modtrain.training.spikes.detector import Judged, RollBackError, Spike, SpikeJudge, SpikeTrace


class SpikeGuard(Guard):
    """Looks at what the module's judge has found, and stops, tells or rolls back.

    The judge has left out every step since a spike that halts.
    """

    def __init__(
        self,
        trace: SpikeTrace,
        data: TokenDataModule,
        intervals: list[int],
        checkpointer: Checkpointer,
        metrics_log: MetricsLog,
        say: Callable[[str], None],
        ranks: Ranks,
    ) -> None:
        """Stand before what is not to happen after a spike.

        intervals: of what is due, the records' first. say: tells the user, once for all ranks.
        """
        super().__init__(trace.run, data, intervals, checkpointer, ranks)
        self.trace, self.metrics_log, self.say = trace, metrics_log, say

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Look where something is due."""
        if self.looks(trainer, step):
            judged = self.check()
            if is_due(step, self.intervals[0], module.plan.steps):
                self.metrics_log.write(step, self._figures(judged))

    def check(self) -> Judged:
        """Act upon the steps since the last look; collective.

        Raises:
            TrainingError: the run is to stop. Names the step, its samples, and the checkpoint to go
                back to.
            RollBackError: it is to go back.
        """
        module, judge = self.module, self._judge
        judged = judge.take()
        skips = 0
        for spike in judged.spikes:
            samples = self.data.sample_numbers(spike.step - 1)
            if spike.halts:
                self._halt(judge, spike, samples)
            skips += 1
            self.trace.write("skip", spike, samples)
            self.say(f"{spike.said}: skipped, {judge.config.max_in_a_row} in a row at most")
        module.statistics.drop(skips * module.plan.accumulate)
        return judged

    def _halt(self, judge: SpikeJudge, spike: Spike, samples: list[int]) -> None:
        config = judge.config
        if config.action == "roll_back" and self.trace.rollbacks < config.max_rollbacks:
            with suppress(CheckpointError):
                self.checkpointer.wait()
            raise RollBackError(spike, samples)
        self.trace.write("stop", spike, samples)
        why = ""
        if config.action == "skip":
            why = f", after {config.max_in_a_row} skipped in a row (spike.max_in_a_row)"
        if config.action == "roll_back":
            why = f", after {self.trace.rollbacks} roll backs (spike.max_rollbacks)"
        raise self.stopped(f"{spike.said}{self._who(spike)}{why}", samples, spike.is_finite)

    def _who(self, spike: Spike) -> str:
        """Name the ranks whose own loss is no number, if there are others."""
        bad = [not math.isfinite(loss) for loss in self.ranks.all_gather_object(spike.own_loss)]
        if not any(bad) or all(bad):
            return ""
        return f" on rank {', '.join(str(rank) for rank, is_bad in enumerate(bad) if is_bad)}"

    def _figures(self, judged: Judged) -> dict[str, float]:
        values: dict[str, float] = {
            "spike/skipped": judged.skipped,
            "spike/rollbacks": self.trace.rollbacks,
        }
        if (last := judged.last) is not None:
            values |= {
                "spike/loss": last.loss,
                "spike/grad_norm": last.grad_norm,
                "spike/loss_limit": last.loss_limit,
                "spike/grad_norm_limit": last.grad_norm_limit,
            }
        # Infinite: not judged yet. JSON knows no such number.
        return {name: value for name, value in values.items() if math.isfinite(value)}

    @property
    def _judge(self) -> SpikeJudge:
        if self.module.judge is None:
            raise RuntimeError("there is no judge of spikes to look at")
        return self.module.judge
