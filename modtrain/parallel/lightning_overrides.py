"""Everything of Lightning's that is patched or switched off, each with its reason.

tests/parallel/test_lightning_overrides.py has a test for each that fails when Lightning changes
there.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer

from modtrain.distributed.launch import Launch

SWITCHED_OFF: dict[str, Any] = {
    # `MetricsLog` and `CheckpointCallback` write, and their files survive a kill at any moment.
    "logger": False,
    "enable_checkpointing": False,
    # `ProgressCallback` and `modtrain plan` show these.
    "enable_progress_bar": False,
    "enable_model_summary": False,
    # `HeldOutCallback` evaluates, by steps and with the model's own ways of routing.
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    # The order of samples is a function of the step, and survives another number of ranks.
    "use_distributed_sampler": False,
    # The length is a number of steps.
    "max_epochs": -1,
}
"""Arguments of Lightning's trainer that switch off what modtrain does in another way."""

_IGNORED_WARNINGS = (
    # A checkpoint between two epochs is the only kind here: an epoch has no end.
    "You're resuming from a checkpoint that ended before",
    # The data module chooses the number of workers; validation runs in a callback.
    ".*does not have many workers.*",
    "You passed in a `val_dataloader`",
    # The user chooses what starts the processes.
    "The `srun` command is available on your system",
    ".isinstance.treespec, LeafSpec.. is deprecated",
)


def silence_messages() -> None:
    """Ignore messages of Lightning's that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def cluster_environment(launch: Launch) -> ClusterEnvironment:
    """Return the environment that ``launch`` describes, whatever Lightning would detect.

    In a Slurm job Lightning would add its own requeueing, which saves inside a signal handler.
    """
    return TorchElasticEnvironment() if launch.world_size > 1 else LightningEnvironment()


def disable_signal_handlers(trainer: L.Trainer) -> None:
    """Keep Lightning from replacing the handlers of `STOP`; it has no public switch.

    Its SIGTERM handler runs a collective, and ends the rank that received the signal during setup
    while the others wait for it.
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None


def set_loop_position(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Set the micro-batch counters of Lightning's loop in ``checkpoint``, in place.

    Lightning counts micro-batches, and finds the end of a step by their number. On another number
    of data-parallel ranks a step has another number of micro-batches, ``accumulate``.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    shift = int(checkpoint["global_step"]) * accumulate - int(progress["current"]["ready"])
    for counters in (progress["total"], progress["current"]):
        for name, count in counters.items():
            counters[name] = count + shift


class StateByName(Strategy):
    """A strategy whose checkpoints have state by name, which Lightning's dictionary has not.

    Lightning numbers parameters, and gathers them on one rank: no other strategy could resume from
    it. `save_checkpoint` and `load_checkpoint` of a subclass write and read weights and optimizer
    state; these hooks leave them out of the dictionary.
    """

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Pieces can be read only when it is known who has which."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state comes with the weights."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Leave the weights to `save_checkpoint`."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Leave it to `save_checkpoint`."""
        del optimizer
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Nothing is left to do after `load_checkpoint`."""


class OwnMeshes(ModelParallelStrategy):
    """Lightning's strategy for models that are sharded from outside, without its mesh.

    It would make one of two axes, which other degrees of parallelism do not fit, and initialize a
    process group, which is there.
    """

    def setup_environment(self) -> None:
        """Prepare this rank's device."""
        if self.accelerator is None:
            raise RuntimeError("Lightning has given no accelerator")
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
