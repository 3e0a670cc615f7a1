"""Records loss, rates, throughput and routing at intervals."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import lightning as L
import torch

from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.process_group import Ranks
from modtrain.evaluation.router_health import health_warnings
from modtrain.training.callbacks.step import StepCallback
from modtrain.training.hardware import peak_flops
from modtrain.training.metrics_log import MetricsLog
from modtrain.training.module import LanguageModule
from modtrain.training.schedules import is_due

# Share of the run after which a router that is off is worth a warning.
_TRAINED = 0.2


class StepClock:
    """Time spent on training steps only: evaluations and checkpoints pause it."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._spent = 0.0

    def lap(self) -> float:
        """Return the seconds since the last lap, without pauses."""
        now = time.perf_counter()
        spent, self._spent = self._spent + now - self._since, 0.0
        self._since = now
        return spent

    def __enter__(self) -> None:
        """Pause the clock."""
        self._spent += time.perf_counter() - self._since

    def __exit__(self, *_error: object) -> None:
        """Start it again."""
        self._since = time.perf_counter()


@dataclass(eq=False)
class MetricsCallback(StepCallback):
    """Writes a record every ``every`` steps. Only here a step waits for the device."""

    metrics_log: MetricsLog
    clock: StepClock
    every: int
    precision: str
    ranks: Ranks
    latest: dict[str, float] = field(default_factory=dict, init=False)
    _last_step: int = field(default=0, init=False)
    _peak: float | None = field(default=None, init=False)
    _warned: set[str] = field(default_factory=set, init=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; print once if the MFU cannot be computed."""
        self._last_step = trainer.global_step
        self._peak = peak_flops(pl_module.device, self.precision)
        if self._peak is None:
            device = f"this device ({pl_module.device.type}, {self.precision})"
            pl_module.print(f"no MFU: the peak FLOP/s of {device} are not known")
        self.clock.lap()

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Write a record when it is due."""
        if not is_due(step, self.every, module.plan.steps):
            return
        values = self._learning(module)
        data: TokenDataModule | None = getattr(trainer, "datamodule", None)
        padding = None if data is None else data.padding_share(step - 1)
        if padding is not None:
            values["padding"] = padding
        last, self._last_step = self._last_step, step
        steps = step - last
        # Reading the loss above waited for the device, so the time is that of finished steps.
        seconds = self.clock.lap()
        if steps > 0:
            values["throughput/tokens_per_second"] = steps * module.plan.tokens_per_step / seconds
            values["throughput/step_seconds"] = seconds / steps
            if self._peak is not None:
                spent = module.plan.flops_until(step) - module.plan.flops_until(last)
                possible = seconds * self._peak * module.plan.dims.world_size
                values["throughput/mfu"] = spent / possible
        self.latest = values
        self.metrics_log.write(step, values)
        self._warn(module, step, values)

    def _warn(self, module: LanguageModule, step: int, values: dict[str, float]) -> None:
        """Warn once of each router that is off; at the start none is trained yet."""
        if step < _TRAINED * module.plan.steps:
            return
        for key, text in health_warnings(module.config.model.routed_labels, values).items():
            if key not in self._warned:
                self._warned.add(key)
                module.print(f"warning: step {step:,}: {text}")

    def _learning(self, module: LanguageModule) -> dict[str, float]:
        statistics = module.take_statistics()
        model = module.config.model
        values = statistics.means()
        if statistics.grad_norm is not None:
            values["grad_norm"] = float(statistics.grad_norm)
        if self.ranks.world_size > 1:
            # Every rank has an equal share of the step.
            own = torch.tensor(list(values.values()), dtype=torch.float64)
            means = (self.ranks.sum(own) / self.ranks.world_size).tolist()
            values = dict(zip(values, means, strict=True))
        # Most of these are no means: not those of the ranks' values, but of the ranks' sums.
        routing = statistics.routing.over_ranks(self.ranks.sum)
        values |= routing.router_metrics(model.routed_labels)
        values |= routing.expert_metrics(model.expert_labels, model.experts.noop)
        return values | module.learning_rates
