"""What does modtrain cost a training step? A whole run against a bare loop over the same model.

    python -m benchmarks.dense_step

A real ``train()`` of a dense model, in float32 on the CPU, with its data module, its callbacks, its
records and its progress; and the loop below without Lightning: the same `Transformer`, fused AdamW,
clipping, schedule and batches. They take turns, step by step, in one process, and have to come to
the same weights. ``over_plain_loop``: steps a second of the first over those of the second; median
over rounds of as many steps as are between two records, without the warm-up and the run's last
step, which evaluates and saves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks._harness import (
    HEAD_WIDTH,
    check_width,
    finish,
    fix_threads,
    prepare_words,
    print_times,
    ratio,
)
from modtrain.data.config import DataConfig
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.models.config import ModelConfig
from modtrain.models.transformer import Transformer
from modtrain.parallel.config import StrategyConfig
from modtrain.training.config import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    TrainConfig,
)
from modtrain.training.run import train
from modtrain.training.schedules import lr_factor


def main() -> None:
    """Measure, print the times, and the result as JSON on the last line."""
    options = _options()
    fix_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare_words(root, options.seq_len)
        config = _config(options, root)
        turns = _Turns(config)
        train(config, [turns])
    seconds = turns.rounds(options.log_every, skip=options.log_every)
    print_times(f"{options.log_every} training steps", seconds)
    finish(
        "dense_step",
        {
            "over_plain_loop": ratio(seconds["plain loop"], seconds["modtrain"]),
            "steps_per_second": options.log_every / min(seconds["modtrain"]),
        },
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=256, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--log-every", type=int, default=10, help="steps of a round")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    check_width(parser, options.d_model)
    if min(options.layers, options.seq_len, options.rounds, options.log_every, options.threads) < 1:
        parser.error("every number must be at least 1")
    if options.vocab < 300:
        parser.error("--vocab must be at least 300, the tokenizer's")
    return options


def _config(options: argparse.Namespace, root: Path) -> TrainConfig:
    # One round to warm up, and a last step that is not counted.
    steps = options.log_every * (options.rounds + 1) + 1
    return TrainConfig(
        name="dense",
        runs_dir=f"{root}/runs",
        precision="fp32",
        model=ModelConfig(
            d_model=options.d_model,
            num_layers=options.layers,
            num_heads=options.d_model // HEAD_WIDTH,
            vocab_size=options.vocab,
            pattern="dense",
        ),
        data=DataConfig(path=f"{root}/data", seq_len=options.seq_len),
        budget=BudgetConfig(steps=steps, tokens=None, flops=None),
        batch=BatchConfig(tokens=options.seq_len, micro_batch_size=1),
        strategy=StrategyConfig(accelerator="cpu", num_threads=options.threads),
        eval=EvalConfig(every=None, sequences=1, batch_size=1),
        checkpoint=CheckpointConfig(every=10**9),
        log=LogConfig(every=options.log_every),
    )


def _plain_loop(config: TrainConfig) -> Iterator[nn.Module]:
    """Train as one would without modtrain's trainer; gives the model after each step."""
    steps = config.budget.steps or 0
    model = Transformer(config.model, seed=config.seed)
    settings = config.optimizer
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(config.schedule, step, steps)
    )
    data = TokenDataModule(
        config.data, micro_batch_size=1, accumulate=1, num_steps=steps, eval_batch_size=1
    )
    for batch in data.train_dataloader():
        optimizer.zero_grad()
        loss = model(batch.inputs_BS, batch.targets_BS).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or float("inf"))
        optimizer.step()
        schedule.step()
        yield model


class _Turns(L.Callback):
    """Takes a step of the plain loop after each step of the run, and times both.

    All that the run does from the end of this callback to its next call is the run's time.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.plain = _plain_loop(config)
        self.seconds: dict[str, list[float]] = {"modtrain": [], "plain loop": []}
        self._since: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_arguments: Any, **_named: Any) -> None:
        """Note the run's step and take the other."""
        start = time.perf_counter()
        model = next(self.plain)
        end = time.perf_counter()
        # The first step's start is not known, and the last one evaluates and saves.
        if self._since is not None and trainer.global_step < trainer.max_steps:
            self.seconds["modtrain"].append(start - self._since)
            self.seconds["plain loop"].append(end - start)
        if trainer.global_step == trainer.max_steps:
            _check_equal(trainer.lightning_module.model, model)
        self._since = time.perf_counter()

    def rounds(self, length: int, skip: int) -> dict[str, list[float]]:
        """Return the seconds of each round of ``length`` steps after the first ``skip``."""
        return {
            name: [sum(values[i : i + length]) for i in range(skip - 1, len(values), length)]
            for name, values in self.seconds.items()
        }


def _check_equal(trained: Any, plain: nn.Module) -> None:
    """Refuse to compare loops that do not do the same."""
    pairs = zip(trained.named_parameters(), plain.parameters(), strict=True)
    for (name, one), other in pairs:
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
            raise RuntimeError(f"the two loops do not compute the same: {name} differs")


if __name__ == "__main__":
    main()
