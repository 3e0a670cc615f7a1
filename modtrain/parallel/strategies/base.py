"""What modtrain adds to every strategy of Lightning's.

The model is parallelized from outside before it is trained, gradients are clipped by exact norms,
and state goes in and out of checkpoints by name, so that a run may resume under another strategy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn
from torch.optim import Optimizer

from modtrain.checkpoint import state
from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.models.transformer import ModelOutput, Transformer
from modtrain.parallel.config import StrategyOptions
from modtrain.parallel.grad_clip import clip
from modtrain.parallel.lightning_overrides import StateByName

Forward = Callable[..., ModelOutput]


class TrainingStrategy(StateByName):
    """What a run needs of its strategy beside what Lightning does. A mixin: it stands first.

    options, checkpointer: of the run; `make_strategy` sets them. deduplicate: each rank has the
    keys of the whole state, not other ones; see `Checkpointer.save`.
    """

    options: StrategyOptions
    checkpointer: Checkpointer
    deduplicate = True

    @property
    def data_rank(self) -> int:
        """Return this rank's number among those that read different data."""
        return self.options.dims.data_rank(dist.get_rank() if dist.is_initialized() else 0)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a step, once the copy of a save in flight is complete."""

        def wait_after_backward() -> Any:
            loss = closure()
            self.checkpointer.wait_for_copy()
            return loss

        return super().optimizer_step(optimizer, wait_after_backward, model, **kwargs)

    @abstractmethod
    def parallelize(self, model: Transformer) -> Forward:
        """Spread ``model`` over the ranks, in place; return what a training step calls."""

    def clip_gradients(
        self, groups: Sequence[Sequence[nn.Parameter]], limit: float | None
    ) -> list[Tensor]:
        """Clip each group of parameters by its own norm; return the norms before."""
        return [clip(group, limit) for group in groups]

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Return the mean over all ranks, the same bits on each; the host does not wait for it."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size == 1:
            return values
        # Lightning's own reduction lets everybody wait for everybody first.
        total = values.clone()
        dist.all_reduce(total)
        return total / world_size

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Save the run's state; what is not a tensor of model or optimizer is in ``checkpoint``.

        storage_options: ``{"blocking": False}`` continues training while the disk writes.
        """
        rank_state = checkpoint.pop("rank_state")
        tensors, named = self.named_state()
        self.checkpointer.save(
            Path(filepath),
            tensors,
            {**checkpoint, **named},
            int(checkpoint["global_step"]),
            rank_state,
            blocking=(storage_options or {}).get("blocking", True),
            # Copied while the next step computes, until `optimizer_step` changes the weights.
            async_copy=True,
            deduplicate=self.deduplicate,
        )

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore model and optimizer in place; return the rest. Always plain data."""
        del weights_only
        restored = self.restore(Path(checkpoint_path))
        return {**restored.extra_state, "rank_state": restored.rank_state}

    def named_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors to save by name, and their metadata."""
        return state.named_state(self._transformer, self.optimizers[0])

    def restore(self, path: Path) -> state.RestoredState:
        """Put model and optimizer back into place; return what else was saved."""
        ranks = self.checkpointer.ranks
        return state.restore(path, self._transformer, self.optimizers[0], ranks)

    def take(self, path: Path, sources: Mapping[str, str], with_optimizer: bool) -> None:
        """Put tensors of another model's checkpoint in place; see `modtrain.checkpoint.state.take`.

        Once model and optimizer are set up. with_optimizer: their state in the optimizer too.
        """
        optimizer = self.optimizers[0] if with_optimizer else None
        ranks = self.checkpointer.ranks
        state.take(path, self._transformer, sources, optimizer, ranks)

    @property
    def _transformer(self) -> Transformer:
        model = getattr(self.lightning_module, "model", None)
        if not isinstance(model, Transformer):
            raise TypeError("modtrain's strategies train a LanguageModule")
        return model


def make_strategy(
    options: StrategyOptions, device_type: str, checkpointer: Checkpointer
) -> TrainingStrategy:
    """Make the strategy that ``options.config`` names; collective.

    Raises:
        ConfigError: the strategy is not available here.
    """
    file, name = options.config.preset.implementation.split(".")
    # When it is needed: DeepSpeed takes seconds to import, and need not be installed.
    kind = getattr(import_module(f"modtrain.parallel.strategies.{file}"), name)
    strategy: TrainingStrategy = kind(options, device_type)
    strategy.options, strategy.checkpointer = options, checkpointer
    return strategy
