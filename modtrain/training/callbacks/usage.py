"""Keeps the record of what a run uses up to date."""

from __future__ import annotations

import time

import lightning as L
import torch

from modtrain.distributed.launch import Launch
from modtrain.training.callbacks.metrics import MetricsCallback
from modtrain.training.callbacks.step import StepCallback
from modtrain.training.hardware import peak_flops
from modtrain.training.module import LanguageModule
from modtrain.training.schedules import is_due
from modtrain.training.usage import StartUsage, UsageRecord, job_id, job_times, node_cpus


class UsageCallback(StepCallback):
    """Takes over what a record has of the time; it comes after `MetricsCallback`."""

    def __init__(self, usage: UsageRecord, metrics: MetricsCallback) -> None:
        self.usage, self.metrics = usage, metrics
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the first step."""
        self._last_step = trainer.global_step

    def on_step_end(self, trainer: L.Trainer, module: LanguageModule, step: int) -> None:
        """Note the steps since the last record."""
        if is_due(step, self.metrics.every, module.plan.steps):
            steps, self._last_step = step - self._last_step, step
            pace = self.metrics.latest.get("throughput/step_seconds", 0.0)
            self.usage.update(step, module.plan.flops_until(step), steps * pace)


def start_usage(launch: Launch, accelerator: str, precision: str) -> StartUsage:
    """Return the entry of a start that begins now."""
    on_cuda = accelerator == "cuda"
    device = torch.device("cuda", launch.local_rank) if on_cuda else torch.device("cpu")
    eligible, allocated = job_times()
    now = time.time()
    return StartUsage(
        begun=now,
        until=now,
        processes=launch.world_size,
        nodes=launch.num_nodes,
        gpus=launch.world_size if on_cuda else 0,
        cpus=launch.num_nodes * node_cpus(),
        device=torch.cuda.get_device_name(device) if on_cuda else accelerator,
        peak_flops=peak_flops(device, precision),
        job=job_id(),
        allocated=allocated,
        queued=None if eligible is None or allocated is None else max(0.0, allocated - eligible),
    )
