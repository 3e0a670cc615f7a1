"""Runs of real ranks with a spike in their data."""

import json
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

from modtrain.checkpoint.layout import checkpoint_path
from modtrain.checkpoint.reading import read_extra_state
from modtrain.cli.compose import compose
from modtrain.data.config import DataConfig
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.training.metrics_log import read_metrics
from modtrain.training.module import LanguageModule
from modtrain.training.run import train
from tests.helpers.runs import run_lines

STEPS, SEQUENCES = 9, 4
# The spike is in the samples of this step, counted from 1, of a run that leaves nothing out.
BAD = 7
NAN = float("nan")


def overrides(prepared: Path, runs: Path, name: str, strategy: str, *more: str) -> list[str]:
    return run_lines(
        *(prepared, runs, name, f"budget.steps={STEPS}", f"batch.tokens={SEQUENCES * 64}"),
        *("batch.micro_batch_size=1", "checkpoint.every=6", "checkpoint.keep_last=9"),
        *("checkpoint.background=false", "eval.every=null", "eval.sequences=4"),
        *("model.router.causal=[auxiliary,predictor,threshold]", f"strategy={strategy}"),
        *("spike.warmup=3", "spike.threshold=60", *more),
    )


def numbers_of(prepared: Path, step: int) -> list[int]:
    """The sample numbers of a step, counted from 1, of a run that leaves nothing out."""
    data = TokenDataModule(
        DataConfig(path=str(prepared)),
        micro_batch_size=SEQUENCES,
        accumulate=1,
        num_steps=STEPS,
        eval_batch_size=1,
    )
    return data.sample_numbers(step - 1)


class Steps(L.Callback):
    """Notes whether each step changed any of weights, moments, counts of steps, buffers."""

    def __init__(self):
        self.before, self.changed, self.detector = None, [], None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        tensors, _ = trainer.strategy.named_state()
        local = [v.to_local() if hasattr(v, "to_local") else v for v in tensors.values()]
        now = [value.detach().clone() for value in local]
        before = self.before or [torch.zeros_like(value) for value in now]
        same = [torch.equal(one, other) for one, other in zip(before, now, strict=True)]
        self.changed.append("none" if all(same) else "some" if any(same) else "all")
        self.before = now
        if module.spikes is not None:
            state = module.spikes.detector.state()
            self.detector = {key: value.tolist() for key, value in state.items()}


def scale_loss(bad: list[int], factor: float, rank: int | None = None) -> None:
    """Let the loss of any step that holds one of the samples be a multiple of what it is."""
    original = LanguageModule.training_step

    def training_step(module, batch, batch_idx):
        numbers = module.trainer.datamodule.sample_numbers(module.global_step)
        if not set(bad) & set(numbers) or (rank is not None and dist.get_rank() != rank):
            return original(module, batch, batch_idx)
        forward = module._forward[0]

        def scaled(*args, **kwargs):
            output = forward(*args, **kwargs)
            return output._replace(loss=output.loss * factor)

        module._forward[0] = scaled
        try:
            return original(module, batch, batch_idx)
        finally:
            module._forward[0] = forward

    LanguageModule.training_step = training_step


def spiked(lines: list[str], bad: list[int], factor: float = 1e3, rank: int | None = None):
    """Train on scaled samples; return status, what each step changed, the detector's state."""
    scale_loss(bad, factor, rank)
    steps = Steps()
    status = train(compose("train", lines), [steps]).status
    return status, steps.changed, steps.detector


def records(run: Path, key: str) -> dict[int, float]:
    return {r["step"]: r[key] for r in read_metrics(run / "metrics.jsonl") if key in r}


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def rest_of(run: Path, step: int) -> dict:
    return read_extra_state(checkpoint_path(run / "checkpoints", step))
