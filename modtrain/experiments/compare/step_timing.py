"""Training-step times of several models, measured side by side."""

from __future__ import annotations

import statistics
import time

import torch

from modtrain.data.stream.batch import Batch
from modtrain.models.transformer import Transformer
from modtrain.optimizers.registry import build_optimizer
from modtrain.parallel import activation_checkpointing
from modtrain.parallel.parallelize import compile_model
from modtrain.training.config import TrainConfig
from modtrain.training.hardware import resolve_accelerator, resolve_precision


def step_seconds(configs: dict[str, TrainConfig], rounds: int) -> dict[str, float]:
    """Return the median seconds of a micro-batch's training step of each model.

    The models take turns within each round, so that a machine that slows down slows all of them.
    Forward, backward and optimizer are timed, on random tokens, with fresh weights.
    """
    steps = {name: _TimedStep(config) for name, config in configs.items()}
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    return {name: statistics.median(values) for name, values in seconds.items()}


class _TimedStep:
    def __init__(self, config: TrainConfig) -> None:
        self.device = torch.device(resolve_accelerator(config.strategy.accelerator))
        self.bf16 = resolve_precision(config.precision, self.device.type) == "bf16"
        model = Transformer(config.model, seed=config.seed).to(self.device)
        activation_checkpointing.apply(model, config.strategy.activation_checkpointing)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.model = compile_model(model) if config.compile else model
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch.micro_batch_size, (config.data.seq_len or 1) + 1)
        tokens = torch.randint(0, config.model.vocabulary, shape, generator=generator)
        self.batch = Batch.from_tokens(tokens.to(self.device), config.data.eos_id)

    def __call__(self) -> float:
        self._wait()
        start = time.perf_counter()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            batch = self.batch
            output = self.model(batch.inputs_BS, batch.targets_BS, **batch.masks())
            loss = sum(output.auxiliary.values(), start=output.loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
