"""What modtrain patches in Lightning is still there, and works as it is described."""

import inspect
import signal
from typing import ClassVar

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy
from packaging.version import Version
from torch.utils.data import DataLoader

from modtrain.distributed.launch import Launch
from modtrain.parallel.lightning_overrides import (
    SWITCHED_OFF,
    OwnMeshes,
    StateByName,
    cluster_environment,
    disable_signal_handlers,
    set_loop_position,
    silence_messages,
)
from modtrain.parallel.strategies.base import TrainingStrategy


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

    def run(steps, accumulate, patched=True, ckpt_path=None, strategy="auto"):
        module, loader = Line(), DataLoader(torch.ones(64, 1))
        silence_messages()
        trainer = L.Trainer(
            accelerator="cpu",
            strategy=strategy,
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


class Named(StateByName, SingleDeviceStrategy):
    """Keeps the last dictionary of Lightning's, and gives it back."""

    kept: ClassVar[dict] = {}

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        self.kept.update(checkpoint)

    def load_checkpoint(self, checkpoint_path, weights_only=None):
        # After the setup, or there would be no optimizer to restore.
        assert self.optimizers
        return {**self.kept, "state_dict": "not read", "optimizer_states": "not read"}


def test_no_state_is_in_lightnings_dictionary_or_read_from_it(fit, tmp_path):
    _, trainer = fit(2, 1, strategy=Named("cpu"))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert (Named.kept["state_dict"], Named.kept["optimizer_states"]) == ({}, [{}])
    module, _ = fit(3, 1, strategy=Named("cpu"), ckpt_path=str(tmp_path / "saved.ckpt"))
    assert module.steps == [2]


class Whole(OwnMeshes):
    """Lightning's strategy for sharded models, where nothing is sharded."""

    distributed_sampler_kwargs: ClassVar[dict] = {"num_replicas": 1, "rank": 0}


def test_no_mesh_and_no_process_group_are_created(fit, monkeypatch):
    monkeypatch.setattr(Line, "configure_model", lambda self: None)
    strategy = Whole()
    module, _ = fit(2, 1, strategy=strategy)
    assert module.steps == [0, 1]
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="device mesh"):
        _ = strategy.device_mesh
    # What it stands in for does both.
    replaced = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "_setup_distributed()" in replaced
    assert "_setup_device_mesh(" in replaced
    assert "set_world_ranks()" in inspect.getsource(ModelParallelStrategy._setup_distributed)


OWN = {"deduplicate", "data_rank", "parallelize", "clip_gradients"}
OWN |= {"mean_over_ranks", "named_state", "restore", "take"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in (TrainingStrategy, StateByName, OwnMeshes)
        for name in vars(kind)
        if name[0] != "_" and name not in OWN
    ],
)
def test_what_strategies_override_is_a_hook_of_lightnings(kind, name):
    own, hook = getattr(kind, name), getattr(Strategy, name)
    assert isinstance(own, property) == isinstance(hook, property)
    if not isinstance(own, property):
        parameters = [p for p in inspect.signature(hook).parameters if p != "kwargs"]
        assert [p for p in inspect.signature(own).parameters if p != "kwargs"] == parameters
