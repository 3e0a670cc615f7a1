"""ZeRO on real ranks: the same steps as one process, and the same state by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from model_cases import VOCAB, small
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from modtrain.errors import CheckpointError, ConfigError
from modtrain.models.experts_config import ExpertsConfig
from modtrain.models.router_config import RouterConfig
from modtrain.training import deepspeed as zero
from modtrain.training.checkpoint import Saver, checkpoint_path
from modtrain.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from modtrain.training.held_out import evaluate
from modtrain.training.launch import Launch
from modtrain.training.module import LanguageModule
from modtrain.training.plan import CostedStage, TrainingPlan
from modtrain.training.ranks import Ranks
from modtrain.training.strategies import make_strategy
from modtrain.training.strategy_config import StrategyConfig
from modtrain.training.trainer import make_trainer

LENGTH, STEPS = 16, 20
STAGES = (1, 2, 3)
MODELS = {
    "dense": {"pattern": "dense"},
    "tied": {"pattern": "dense", "tie_embeddings": True},
    "mod": {"router": RouterConfig(predictor_dim=8, causal=["predictor", "threshold"])},
    "staged": {"experts": ExpertsConfig(count=4, balance="bias")},
    "integrated": {"pattern": "dense", "experts": ExpertsConfig(count=3, noop=2)},
}


def micro_batch(number):
    """Sequences (2, S + 1)."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)


class Micro(Dataset):
    def __getitem__(self, number):
        return micro_batch(number)


class Rest:
    """What is left of a run's micro-batches; as long as the whole run, as modtrain's own."""

    def __init__(self, numbers, first):
        self.numbers, self.first = numbers, first

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        return iter(self.numbers[self.first :])


class Watched(LanguageModule):
    """Keeps its losses, evaluates after each step, saves at the end, or at once what it was given."""

    def __init__(self, config, plan, path, evaluates, saves_again):
        super().__init__(config, plan)
        self.path, self.evaluates, self.saves_again = path, evaluates, saves_again
        self.losses, self.norms, self.held_out, self.rates = [], [], [], []

    def on_train_start(self):
        super().on_train_start()
        if self.saves_again is not None:
            self.trainer.save_checkpoint(self.saves_again)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach().clone())
        return loss

    def configure_gradient_clipping(self, *args, **kwargs):
        super().configure_gradient_clipping()
        self.norms.append(float(self.statistics.grad_norm))

    def optimizer_step(self, *args, **kwargs):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        super().optimizer_step(*args, **kwargs)
        if self.evaluates:
            context = self.trainer.precision_plugin.forward_context()
            found = evaluate(self.model, [micro_batch(10_000)], context)
            self.held_out += [found.causal_loss, found.top_k_loss]

    def on_train_end(self):
        if self.path is not None:
            self.trainer.save_checkpoint(self.path)


def run(name, kind, steps, path=None, given=None, **choices):
    """Train from the checkpoint ``given``, or the start, to ``steps``; save there as ``path``."""
    ranks = Ranks()
    torch.manual_seed(0)
    model = small(num_layers=2, capacity=0.5, **MODELS[kind])
    if choices.pop("partitions_all", False):
        partition_all()
    clip, evaluates = choices.pop("clip", 0.3), choices.pop("evaluates", False)
    saves_again = choices.pop("saves_again", None)
    accumulate, start = choices.pop("accumulate", 1), choices.pop("start", 0)
    own = {key: choices.pop(key) for key in ("offload", "activation_checkpointing") if key in choices}
    config = TrainConfig(
        precision=choices.pop("precision", "fp32"),
        model=model,
        optimizer=OptimizerConfig(lr=1e-2, grad_clip=clip),
        schedule=ScheduleConfig(warmup=0.1),
        strategy=StrategyConfig(name=name, accelerator="cpu", **own),
        **choices,
    )
    plan = TrainingPlan(LENGTH, 4, accumulate, (CostedStage(0, steps, model.capacities, 1.0),))
    # The schedule is that of the whole run, wherever this part of it ends.
    whole = replace(plan, stages=(replace(plan.stages[0], stop=STEPS),))
    module = Watched(config, whole, path, evaluates, saves_again)
    count = ranks.world_size * accumulate
    numbers = range(ranks.rank, steps * count, ranks.world_size)
    launch = Launch(ranks.world_size, ranks.rank, ranks.rank, ranks.world_size)
    with Saver(ranks) as saver:
        strategy = make_strategy(config, plan, "cpu", saver)
        trainer = make_trainer(config, plan, strategy, launch, [])
        rest = Rest(numbers, start * accumulate)
        loader = DataLoader(Micro(), sampler=rest, batch_size=None)
        trainer.fit(module, loader, ckpt_path=given)
    losses = torch.stack(module.losses)
    if ranks.world_size > 1:
        dist.all_reduce(losses)
        losses /= ranks.world_size
    # As an array: a tensor is sent by a file that its process has to outlive.
    return losses.numpy(), module.norms, module.held_out, module.rates


def call(jobs):
    """Several runs of one set of ranks, which all import DeepSpeed once."""
    return [run(*arguments, **choices) for arguments, choices in jobs]


def partition_all():
    """Stage 3 keeps small parameters whole between steps, and here all of them are small."""
    made = zero.zero_config

    def config(*arguments):
        found = made(*arguments)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    zero.zero_config = config


def tensors_at(path):
    from saved import tensors_of

    return tensors_of(Path(path))


def assert_same(one, other, atol=0.0):
    """Equal tensors under equal names; what ranks have for themselves is left out."""
    one, other = ({k: t for k, t in s.items() if not k.startswith("ranks.")} for s in (one, other))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if atol == 0 else torch.allclose(
            value, other[key], rtol=0, atol=atol
        ), key
