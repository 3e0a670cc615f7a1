"""What modtrain patches in Lightning is still there, and works as it is described."""

from __future__ import annotations

import inspect
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import Strategy
from packaging.version import Version
from torch.utils.data import DataLoader

from modtrain.distributed.launch import Launch
from modtrain.parallel.strategies.base import TrainingStrategy
from modtrain.training.lightning_overrides import (
    SWITCHED_OFF,
    cluster_environment,
    disable_signal_handlers,
    set_loop_position,
    silence_messages,
)


class Line(L.LightningModule):
    """Two weights, and the handler of SIGTERM while they are trained."""

    def __init__(self):
        super().__init__()
        self.layer, self.handler = torch.nn.Linear(1, 1), None
        self.steps: list[int] = []

    def training_step(self, batch, batch_idx):
        self.handler = signal.getsignal(signal.SIGTERM)
        self.steps.append(self.global_step)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fit(tmp_path):
    """Train some steps of ``accumulate`` micro-batches; returns module and trainer."""

    def run(steps: int, accumulate: int, patched: bool = True, ckpt_path: str | None = None):
        module, loader = Line(), DataLoader(torch.ones(64, 1))
        silence_messages()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            default_root_dir=str(tmp_path),
            plugins=[cluster_environment(Launch())],
            **SWITCHED_OFF,
        )
        if patched:
            disable_signal_handlers(trainer)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module, trainer

    return run


def test_the_version_of_lightning_is_one_that_this_was_checked_with():
    """Look through `lightning_overrides` and the strategies before this is raised."""
    assert Version("2.6.4") <= Version(L.__version__) < Version("2.7")


@pytest.mark.parametrize("patched", [True, False])
def test_lightning_replaces_a_handler_only_without_the_patch(fit, patched):
    def own(*_):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        module, _ = fit(1, 1, patched)
        assert (module.handler is own) == patched
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_loop_resumes_with_another_number_of_micro_batches(fit, tmp_path):
    _, trainer = fit(3, 2)
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert set(progress) >= {"total", "current"}
    assert progress["current"]["ready"] == progress["current"]["completed"] == 6
    set_loop_position(saved, accumulate=4)
    assert progress["current"]["ready"] == progress["total"]["completed"] == 12
    torch.save(saved, path)
    module, trainer = fit(5, 4, ckpt_path=str(path))
    # Two whole steps: without the patch the first one would have other micro-batches.
    assert module.steps == [3] * 4 + [4] * 4
    assert trainer.global_step == 5


OWN = {"attach", "data_rank", "parallelize", "clip_gradients", "mean_over_ranks", "named_state"}


@pytest.mark.parametrize(
    "name", [n for n in vars(TrainingStrategy) if n[0] != "_" and n not in OWN | {"restore"}]
)
def test_what_strategies_override_is_a_hook_of_lightnings(name):
    own, hook = getattr(TrainingStrategy, name), getattr(Strategy, name)
    assert isinstance(own, property) == isinstance(hook, property)
    if not isinstance(own, property):
        parameters = [p for p in inspect.signature(hook).parameters if p != "kwargs"]
        assert [p for p in inspect.signature(own).parameters if p != "kwargs"] == parameters
