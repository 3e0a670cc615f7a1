"""The model inside Lightning: a training step, its optimizer, and what it leaves to be logged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from modtrain.data.stream.documents import document_numbers_if_apart
from modtrain.data.stream.samplers import stream_positions
from modtrain.models.transformer import ModelOutput, Transformer, is_predictor
from modtrain.parallel.strategies.base import Forward, TrainingStrategy
from modtrain.training.config import OptimizerConfig, TrainConfig
from modtrain.training.plan import TrainingPlan
from modtrain.training.schedules import lr_factor
from modtrain.training.spikes.detector import SpikeJudge, check_left_out, leave_out, unless
from modtrain.training.step_statistics import StepStatistics


class LanguageModule(L.LightningModule):
    """Trains a `Transformer` on next-token prediction."""

    def __init__(self, config: TrainConfig, plan: TrainingPlan) -> None:
        super().__init__()
        self.config, self.plan = config, plan
        self.model = Transformer(config.model, seed=config.seed)
        self.statistics = StepStatistics.zero(torch.device("cpu"))
        # Not assigned as a sub-module: its parameters would get a second name in checkpoints.
        self._forward: list[Forward] = []
        self._observed: list[Tensor] = []
        # What a checkpoint held for `on_train_start`.
        self._random_states: dict[str, Any] | None = None
        self._sums: dict[str, Any] | None = None
        self.judge = None if config.spike.action == "none" else SpikeJudge(config.spike)
        # Of the step that is being made: the sums before it, its own loss and objective, and
        # whether its update is left out.
        self._before: StepStatistics | None = None
        self._own_2: Tensor | None = None
        self._left_out: Tensor | None = None

    def configure_model(self) -> None:
        """Let the strategy spread the model over the ranks, once."""
        if not self._forward:
            self._forward = [self._strategy.cut(self.model)]

    @property
    def _strategy(self) -> TrainingStrategy:
        strategy = self.trainer.strategy
        if not isinstance(strategy, TrainingStrategy):
            raise TypeError("a LanguageModule trains under modtrain's own strategies")
        return strategy

    def training_step(self, batch_BT: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch (B, S + 1) of token ids."""
        del batch_idx
        inputs_BS, targets_BS = batch_BT[:, :-1], batch_BT[:, 1:]
        eos_id = self.config.data.eos_id
        output: ModelOutput = self._forward[0](
            inputs_BS,
            targets_BS,
            capacities=self.plan.capacities_at(self.trainer.global_step),
            documents_BS=document_numbers_if_apart(inputs_BS, eos_id),
        )
        if self.judge is not None and self._before is None:
            self._before = replace(self.statistics, auxiliary=dict(self.statistics.auxiliary))
        self.statistics.add(output)
        observed = self.model.batch_stats(output)
        sums = self._observed or [torch.zeros_like(value) for value in observed]
        self._observed = [one + other for one, other in zip(sums, observed, strict=True)]
        if output.loss is None:
            raise RuntimeError("the model gave no loss for its targets")
        total: Tensor = sum(output.auxiliary.values(), start=output.loss)
        if self.judge is not None:
            own_2 = torch.stack([output.loss.detach(), total.detach()]).float()
            self._own_2 = own_2 if self._own_2 is None else self._own_2 + own_2
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the running states of routers and experts follow the step that was made."""
        super().optimizer_step(*args, **kwargs)
        if self._observed:
            # All at once: small tensors, of which each would wait for the network.
            flat = torch.cat([value.flatten() for value in self._observed])
            flat = flat / self.trainer.accumulate_grad_batches
            flat = self._strategy.mean_over_ranks(flat)
            sizes = [value.numel() for value in self._observed]
            means = [
                mean.view_as(value)
                for mean, value in zip(torch.split(flat, sizes), self._observed, strict=True)
            ]
            parts = (*self.model.routers, *self.model.mixtures)
            buffers = [buffer for part in parts for buffer in part.buffers(recurse=False)]
            with unless(self._left_out, buffers):
                self.model.update_running_stats(means)
            self._observed = []

    def take_statistics(self) -> StepStatistics:
        """Return the sums so far and start new ones."""
        taken, self.statistics = self.statistics, StepStatistics.zero(self.device)
        return taken

    def on_train_start(self) -> None:
        """Take up the random states of the checkpoint, after everything else drew from them."""
        self.statistics = StepStatistics.zero(self.device)
        if self._sums is not None:
            self.statistics = StepStatistics.of(self._sums, self.plan.accumulate, self.device)
            self._sums = None
        if self.judge is not None:
            self.judge.to(self.device)
        if self._random_states is not None:
            restore_random_states(self._random_states)
            self._random_states = None

    def configure_optimizers(self) -> Any:
        """Give Lightning AdamW and the schedule by step."""
        config = self.config
        optimizer = adamw(self.model, config.optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(config.schedule, step, self.plan.steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(self, *_args: Any, **_kwargs: Any) -> None:
        """Clip trunk and predictors each by its own norm.

        A common norm would let a predictor's gradient shrink the trunk's step, and it must have no
        effect on the language model (arXiv 2404.02258, section 3.5).
        """
        trunk: list[nn.Parameter] = []
        predictors: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            (predictors if is_predictor(name) else trunk).append(parameter)
        groups = [trunk, predictors] if predictors else [trunk]
        norms = self._strategy.clip_gradients(groups, self.config.optimizer.grad_clip)
        self.statistics.grad_norm = norms[0]
        if self.judge is not None:
            self._judge(self.judge, norms)

    def _judge(self, judge: SpikeJudge, norms: list[Tensor]) -> None:
        """Leave out the step that is being made if it is a spike."""
        if self._own_2 is None or self._before is None:
            raise RuntimeError("a step is judged that had no micro-batch")
        loss, objective = (self._own_2 / self.trainer.accumulate_grad_batches).unbind()
        seen = torch.stack([loss, *(norm.to(loss) for norm in norms), objective])
        # Norms are alike on all ranks already; this makes them so to the bit on any hardware.
        seen = self._strategy.mean_over_ranks(seen)
        self._left_out = judge.judge(self.trainer.global_step + 1, seen, loss)
        leave_out(self._strategy.optimizers[0], self._left_out)
        self.statistics.unless(self._left_out, self._before)
        self._own_2 = self._before = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random states, the position in the data and the spent budget."""
        step = int(checkpoint["global_step"])
        left_out = self._data_left_out()
        sums = self.statistics.state(self.plan.accumulate)
        checkpoint["rank_state"] = {"random_states": random_states(), "sums": sums}
        # For ranks whose own these are not.
        checkpoint["sums"] = self.statistics.mean(self._strategy.mean_over_ranks).state(
            self.plan.accumulate
        )
        if self.judge is not None:
            checkpoint["spikes"] = self.judge.state()
        checkpoint["progress"] = {
            "step": step,
            "samples": self._position(step, left_out),
            "left_out": left_out,
            "tokens": step * self.plan.tokens_per_step,
            "flops": self.plan.flops_until(step),
            "data_parallel": self.plan.sizes.data_parallel,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until training starts."""
        progress = checkpoint["progress"]
        saved = progress.get("left_out", [])
        check_left_out(self._data_left_out(), saved, progress["samples"])
        if self.judge is not None and "spikes" in checkpoint:
            self.judge.load(checkpoint["spikes"])
        own, here = checkpoint["rank_state"], self.plan.sizes.data_parallel
        if progress.get("data_parallel", here) != here:
            # Ranks that read the same data have to draw the same, and theirs read others.
            own = None
        if own is not None:
            self._random_states, self._sums = own["random_states"], own["sums"]
        else:
            # Saved by another number of ranks: none of theirs is this one's. Drawn anew, other than
            # at the start and on every rank its own.
            self._sums = checkpoint["sums"]
            step = int(checkpoint["global_step"])
            seeds = np.random.SeedSequence([self.config.seed, step, self._strategy.data_rank])
            L.seed_everything(int(seeds.generate_state(1)[0]), verbose=False)

    def _data_left_out(self) -> list[list[int]]:
        """Return the stretches of the stream that are not read."""
        data = getattr(self.trainer, "datamodule", None)
        return [list(stretch) for stretch in getattr(data, "left_out", ())]

    def _position(self, step: int, left_out: Sequence[Sequence[int]]) -> int:
        """Return the position behind the last sample that the first ``step`` steps read."""
        if step == 0:
            return 0
        last = np.array(step * self.plan.sequences_per_step - 1, dtype=np.int64)
        return int(stream_positions(last, [(first, stop) for first, stop in left_out])) + 1


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices decay, vectors (gains, biases, routers) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


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
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
