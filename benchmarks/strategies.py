"""Does a strategy change what is learned? The same steps under each one, on several processes.

    python -m benchmarks.strategies

Real ``train()`` runs on the CPU over gloo, in float32: a dense, a MoD, a staged and an integrated
MoDE model, on the same batches, under every strategy on 1, 2 and 4 processes that can train it.
``max_loss_difference``: the greatest difference of any step's loss from that of one process
(``strategy=single``). ``different_choices``: steps and micro-batches in which a router chose other
tokens, or experts got other loads, than there. ``strategies``: how many took part. ``runs``: how
many runs were compared.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks._harness import finish, prepare_words
from modtrain.data.config import DataConfig
from modtrain.distributed.launch import Launch
from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.parallel.config import PRESETS, StrategyConfig
from modtrain.parallel.validation import dims_problems
from modtrain.training.config import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    TrainConfig,
)
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train

SEQ_LEN, MICRO_BATCH, SEQUENCES = 64, 1, 8
_SIZE: Mapping[str, Any] = {"d_model": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4}
MODELS = {
    "dense": ModelConfig(**_SIZE, pattern="dense"),
    "mod": ModelConfig(**_SIZE),
    "staged": ModelConfig(**_SIZE, experts=ExpertsConfig(count=4, top_k=2)),
    "integrated": ModelConfig(
        **_SIZE, pattern="dense", experts=ExpertsConfig(count=4, top_k=1, noop=2)
    ),
}
Choices = dict[tuple[int, int], str]


def main() -> None:
    """Run everything, print a line a run, and the result as JSON on the last line."""
    options = _options()
    differences: list[float] = []
    other_choices = 0
    took_part = set()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare_words(root, SEQ_LEN)
        alone = {name: _results(root, name, "single", 1, options.steps) for name in options.models}
        print(f"{'strategy':<14}{'processes':>10}  {'model':<12}{'loss difference':>16}  choices")
        for strategy, processes, name in _runs(options):
            losses, choices = alone[name]
            own_losses, own_choices = _results(root, name, strategy, processes, options.steps)
            chosen = _num_different(choices, own_choices)
            differences += [abs(a - b) for a, b in zip(losses, own_losses, strict=True)]
            last = max(differences[-options.steps :])
            verdict = "the same" if not chosen else f"{chosen} differ"
            print(f"{strategy:<14}{processes:>10}  {name:<12}{last:>16.1e}  {verdict}", flush=True)
            other_choices += chosen
            took_part.add(strategy)
    finish(
        "strategies",
        {
            "max_loss_difference": max(differences),
            "different_choices": other_choices,
            "strategies": len(took_part),
            "runs": len(differences) // options.steps,
        },
        digits=9,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    names = [name for name in PRESETS if name != "single"]
    parser.add_argument("--strategies", nargs="+", default=names, choices=names)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    if options.steps < 1 or any(SEQUENCES % count for count in options.processes):
        parser.error(f"--steps is at least 1, and each of --processes divides {SEQUENCES}")
    return options


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Give (strategy, processes, model) of all that can be."""
    for strategy in options.strategies:
        for processes in options.processes:
            launch = Launch(processes, 0, 0, processes)
            for name in options.models:
                if not dims_problems(_strategy(strategy, processes), "", MODELS[name], launch):
                    yield strategy, processes, name


def _strategy(name: str, processes: int) -> StrategyConfig:
    # On four processes groups of two, so that both axes of a mesh have something to do.
    config = StrategyConfig(name, accelerator="cpu", num_threads=1, timeout=120.0)
    if config.preset.default is not None:
        setattr(config, config.preset.default, min(2, processes))
    return config


def _config(root: Path, model: str, strategy: str, processes: int, steps: int) -> TrainConfig:
    return TrainConfig(
        name=f"{strategy}_{processes}_{model}",
        runs_dir=f"{root}/runs",
        precision="fp32",
        model=MODELS[model],
        data=DataConfig(path=f"{root}/data"),
        budget=BudgetConfig(steps=steps, tokens=None, flops=None),
        batch=BatchConfig(tokens=SEQUENCES * SEQ_LEN, micro_batch_size=MICRO_BATCH),
        strategy=_strategy(strategy, processes),
        eval=EvalConfig(every=None, sequences=processes, batch_size=1),
        checkpoint=CheckpointConfig(every=10**9),
        log=LogConfig(every=1, tensorboard=False, progress=False),
    )


def _results(
    root: Path, model: str, strategy: str, processes: int, steps: int
) -> tuple[list[float], Choices]:
    """Return the losses of a run, and what all its ranks chose."""
    config = _config(root, model, strategy, processes, steps)
    launched = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=config.name or "",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        # The parent computes nothing, and has everything imported.
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.05,
    )
    of_rank: dict[int, Choices] = elastic_launch(launched, _train)(config)
    choices: Choices = {}
    for chosen in of_rank.values():
        choices |= chosen
    records = read_metrics(Path(config.runs_dir, str(config.name), "metrics.jsonl"))
    return [record["loss"] for record in records if "loss" in record], choices


def _train(config: TrainConfig) -> Choices:
    torch.set_num_threads(1)
    noted = _Noted()
    train(config, [noted])
    return noted.choices


class _Noted(L.Callback):
    """Keeps a digest of what was chosen, by step and micro-batch of all ranks."""

    def __init__(self) -> None:
        self.choices: Choices = {}
        self._output: Any = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Look at what the model returns from now on."""
        del trainer
        module.model.register_forward_hook(self._keep)

    def _keep(self, *arguments: Any) -> None:
        self._output = arguments[-1]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *arguments: Any) -> None:
        """Note the micro-batch that was computed last."""
        del module
        batch_idx = arguments[2]
        data = trainer.datamodule.plan()  # type: ignore[attr-defined]
        step, micro = divmod(batch_idx, data.accumulate)
        digest = hashlib.sha256()
        for record in self._output.routing:
            digest.update(record.chosen_BS.numpy().tobytes())
        for record in self._output.experts:
            digest.update(record.choices_R.numpy().tobytes())
        self.choices[step, micro * data.world_size + data.rank] = digest.hexdigest()


def _num_different(one: Choices, other: Choices) -> int:
    if one.keys() != other.keys():
        raise RuntimeError(f"{len(one)} micro-batches in one process, {len(other)} in several")
    return sum(one[key] != other[key] for key in one)


if __name__ == "__main__":
    main()
