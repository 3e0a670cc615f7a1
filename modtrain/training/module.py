"""The model inside Lightning: its loss, its optimizer, and the state of a run in checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from modtrain.data.stream.batch import Batch
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.samplers import stream_positions
from modtrain.models.transformer import ModelOutput, Transformer, is_predictor
from modtrain.optimizers.parameter_groups import freeze, hold_gradients
from modtrain.optimizers.registry import build_optimizer
from modtrain.parallel.lightning_overrides import set_loop_position
from modtrain.parallel.strategies.base import Forward, TrainingStrategy
from modtrain.training.config import TrainConfig
from modtrain.training.mixture_change import check_same_mixture
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import (
    RunDirectory,
    check_same,
    check_same_data,
    to_train_config,
    with_stages_of,
)
from modtrain.training.schedules import group_lr_factor, is_due
from modtrain.training.spikes.detector import SpikeSkipper
from modtrain.training.spikes.journal import check_left_out
from modtrain.training.step_statistics import RunningStats, StepStatistics


class LanguageModule(L.LightningModule):
    """Trains a `Transformer` on next-token prediction.

    statistics: of the steps since the last record. learning_rates: of the last step, by the
    name that records have them under. spikes: skips steps that are spikes; None where
    the configuration does not ask for it. parent: of the run's manifest, which checkpoints keep.
    """

    def __init__(
        self, config: TrainConfig, plan: TrainingPlan, parent: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config, self.plan, self.parent = config, plan, parent
        self.model = Transformer(config.model, seed=config.seed)
        freeze(self.model, config.optimizer)
        self.statistics = StepStatistics.zero(torch.device("cpu"))
        self.running_stats = RunningStats()
        self.learning_rates: dict[str, float] = {}
        self.spikes = None if config.spike.action == "none" else SpikeSkipper(config.spike)
        # In a list: as a sub-module its parameters would get a second name in checkpoints.
        self._forward: list[Forward] = []
        # Of the checkpoint that training resumes from: it starts with them.
        self._saved: dict[str, Any] = {}

    def configure_model(self) -> None:
        """Let the strategy parallelize the model, once."""
        if not self._forward:
            self._forward = [self._strategy.parallelize(self.model)]

    @property
    def _strategy(self) -> TrainingStrategy:
        strategy = self.trainer.strategy
        if not isinstance(strategy, TrainingStrategy):
            raise TypeError("a LanguageModule needs one of modtrain's own strategies")
        return strategy

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the objective of one micro-batch."""
        del batch_idx
        output: ModelOutput = self._forward[0](
            batch.inputs_BS,
            batch.targets_BS,
            capacities=self.plan.capacities_at(self.trainer.global_step),
            **batch.masks(),
        )
        if batch.weight is not None:
            output = output.weighted(batch.weight)
        if output.loss is None:
            raise RuntimeError("the model returned no loss for its targets")
        objective: Tensor = sum(output.auxiliary.values(), start=output.loss)
        if self.spikes is not None:
            self.spikes.add(output.loss, objective, self.statistics)
        self.statistics.add(output, with_routing=self._is_recorded())
        self.running_stats.add(self.model, output)
        return objective

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make the step, then update the running statistics of routers and experts."""
        # Before it, for the scheduler goes on to the next step's; from the optimizer, which may
        # have them from a checkpoint.
        groups = self._strategy.optimizers[0].param_groups
        self.learning_rates = {group.get("rate_name", "lr"): float(group["lr"]) for group in groups}
        super().optimizer_step(*args, **kwargs)
        self.running_stats.update(
            self.model,
            self.trainer.accumulate_grad_batches,
            self._strategy.mean_over_ranks,
            None if self.spikes is None else self.spikes.is_skipped,
        )

    def _is_recorded(self) -> bool:
        """Whether metrics are recorded after the step that is being made."""
        return is_due(self.trainer.global_step + 1, self.config.log.every, self.plan.steps)

    def take_statistics(self) -> StepStatistics:
        """Return the statistics so far and start new ones."""
        taken, self.statistics = self.statistics, StepStatistics.zero(self.device)
        return taken

    def on_train_start(self) -> None:
        """Restore statistics and random states, after everything else that draws numbers."""
        saved, self._saved = self._saved, {}
        self.statistics = StepStatistics.zero(self.device)
        if saved:
            accumulate = self.plan.accumulate
            self.statistics = StepStatistics.from_state(saved["sums"], accumulate, self.device)
        if self.spikes is not None:
            self.spikes.detector.to(self.device)
        if "random_states" in saved:
            restore_random_states(saved["random_states"])
        if self.config.branch.run is not None:
            self._set_learning_rate()

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the learning-rate schedule by step."""
        config = self.config
        optimizer = build_optimizer(self.model, config.optimizer)
        factors = [
            self._lr_factor_from(group.get("start_step", 0)) for group in optimizer.param_groups
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _lr_factor_from(self, start: int) -> Callable[[int], float]:
        schedule, num_steps = self.config.schedule, self.plan.steps
        # A function: of other callables a scheduler's state would hold a copy.
        return lambda step: group_lr_factor(schedule, step, num_steps, start)

    def _set_learning_rate(self) -> None:
        """Set the next step's rate: the trunk's checkpoint has the one that the trunk came to."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            groups = scheduler.optimizer.param_groups
            for group, highest in zip(groups, scheduler.base_lrs, strict=True):
                factor = self._lr_factor_from(group.get("start_step", 0))
                group["lr"] = highest * factor(self.trainer.global_step)

    def configure_gradient_clipping(self, *_args: Any, **_kwargs: Any) -> None:
        """Clip trunk and predictors each by its own norm; skip the step if it is a spike.

        A common norm would let a predictor's gradient shrink the trunk's step, and it must have no
        effect on the language model (arXiv 2404.02258, section 3.5).
        """
        hold_gradients(self._strategy.optimizers[0].param_groups, self.trainer.global_step)
        trunk: list[nn.Parameter] = []
        predictors: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            (predictors if is_predictor(name) else trunk).append(parameter)
        groups = [trunk, predictors] if predictors else [trunk]
        norms = self._strategy.clip_gradients(groups, self.config.optimizer.grad_clip)
        self.statistics.grad_norm = norms[0]
        if self.spikes is not None:
            self.spikes.decide(
                self.trainer.global_step + 1,
                norms,
                self.trainer.accumulate_grad_batches,
                self._strategy.optimizers[0],
                self.statistics,
                self._strategy.mean_over_ranks,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add random states, statistics, spikes, the position in the data and the spent budget."""
        step, accumulate = int(checkpoint["global_step"]), self.plan.accumulate
        skipped_samples = self._skipped_samples()
        sums = self.statistics.state(accumulate)
        checkpoint["rank_state"] = {"random_states": random_states(), "sums": sums}
        # For resuming on another number of ranks.
        mean = self.statistics.mean(self._strategy.mean_over_ranks)
        checkpoint["sums"] = mean.state(accumulate)
        if self.spikes is not None:
            checkpoint["spikes"] = self.spikes.detector.state()
        checkpoint["data_fingerprint"] = self._data_fingerprint()
        if self.parent is not None:
            checkpoint["parent"] = dict(self.parent)
        checkpoint["config"] = OmegaConf.to_container(OmegaConf.structured(self.config))
        checkpoint["progress"] = {
            "step": step,
            "samples": self._position(step, skipped_samples),
            "left_out": skipped_samples,
            "tokens": step * self.plan.tokens_per_step,
            "flops": self.plan.flops_until(step),
            "data_parallel": self.plan.dims.data_parallel,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added; some of it when training starts.

        Raises:
            OtherRunError: the checkpoint is of a run with another configuration.
        """
        self._check_config(checkpoint.get("config"), checkpoint["progress"]["samples"])
        then, now = checkpoint.get("data_fingerprint"), self._data_fingerprint()
        if then is not None and now is not None:
            check_same_data(RunDirectory.of(self.config).path, then, now, self.config)
        set_loop_position(checkpoint, self.plan.accumulate)
        progress = checkpoint["progress"]
        saved = progress.get("left_out", [])
        check_left_out(self._skipped_samples(), saved, progress["samples"])
        if self.spikes is not None and "spikes" in checkpoint:
            self.spikes.detector.load(checkpoint["spikes"])
        own, data_parallel = checkpoint["rank_state"], self.plan.dims.data_parallel
        # Ranks that read the same data must draw the same numbers: the saved states are of use only
        # where the same ranks read the same data.
        if own is not None and progress.get("data_parallel", data_parallel) == data_parallel:
            self._saved = own
        else:
            # Other numbers than at the start, and other ones on each data-parallel rank.
            self._saved = {"sums": checkpoint["sums"]}
            step = int(checkpoint["global_step"])
            seeds = np.random.SeedSequence([self.config.seed, step, self._strategy.data_rank])
            L.seed_everything(int(seeds.generate_state(1)[0]), verbose=False)

    def _data_fingerprint(self) -> str | None:
        data: TokenDataModule | None = getattr(self.trainer, "datamodule", None)
        return None if data is None else data.summary.fingerprint

    def _check_config(self, saved: Any, position: int) -> None:
        """Compare with what the checkpoint says, which outlives a file that is lost or edited."""
        if saved is None:
            # Of an earlier version.
            return
        before = to_train_config(saved)
        # A trunk is compared with its branch by `check_branch`.
        is_trunks = self.config.branch.run is not None and before.branch != self.config.branch
        if not is_trunks:
            subject = "the checkpoint is of a run"
            check_same(before, with_stages_of(self.config, before), subject, "the checkpoint")
            if before.data.stages != self.config.data.stages:
                check_same_mixture(before, self.config, position, subject)

    def _skipped_samples(self) -> list[list[int]]:
        """Return the intervals of the stream that are not read, [start, stop] each."""
        data = getattr(self.trainer, "datamodule", None)
        return [list(interval) for interval in getattr(data, "skipped_samples", ())]

    def _position(self, step: int, skipped_samples: Sequence[Sequence[int]]) -> int:
        """Return the stream position after the samples of the first ``step`` steps."""
        if step == 0:
            return 0
        last = np.array(step * self.plan.sequences_per_step - 1, dtype=np.int64)
        return int(stream_positions(last, [(start, stop) for start, stop in skipped_samples])) + 1


def random_states() -> dict[str, Any]:
    """Return the states of every global generator, as tensors and plain numbers."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            *(int(position), int(has_gauss), float(cached)),
        ],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set every global generator to what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *others = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *others))
