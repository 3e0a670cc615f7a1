"""Loading a trained run: its model, configuration and held-out text."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from modtrain.checkpoint.recovery import with_checkpoint
from modtrain.common.errors import ConfigError, DataError, Problem
from modtrain.data.config import DataConfig
from modtrain.data.stream.batch import Batch
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.evaluation.held_out import Part
from modtrain.inference.config import TrainedRunConfig
from modtrain.models.transformer import Transformer
from modtrain.training.config import TrainConfig
from modtrain.training.hardware import resolve_accelerator, resolve_precision
from modtrain.training.named_runs import open_run
from modtrain.training.plan import derive
from modtrain.training.run_directory import RunDirectory
from modtrain.training.trained_model import load_model, with_found_data


@dataclass(frozen=True)
class LoadedRun:
    """A run at one of its checkpoints; the model is on its device and in evaluation mode.

    data: what the held-out text is read from, made with the run's tokenizer.
    precision: ``fp32`` or ``bf16``.
    """

    directory: RunDirectory
    trained: TrainConfig
    step: int
    model: Transformer
    device: torch.device
    data: DataConfig
    precision: str

    @property
    def capacities(self) -> tuple[float | None, ...]:
        """The capacity of each layer at this checkpoint, which a schedule changes."""
        return derive(self.trained).capacities_at(max(0, self.step - 1))

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""
        return self.trained.data.seq_len or self.trained.data.summary().seq_len

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most: those of training, or what an import came with."""
        imported = self.directory.read_manifest().get("imported", {})
        return int(imported.get("max_positions") or self.seq_len)

    @property
    def tokenizer(self) -> Path:
        """The run's ``tokenizer.json``."""
        return self.trained.data.tokenizer_path

    @property
    def end_id(self) -> int:
        """The token that ends a document in the run's data."""
        return self.trained.data.summary().eos_id

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the precision."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def held_out(self, sequences: int | None, batch_size: int) -> DataLoader[Batch]:
        """Batches of the first ``sequences`` held-out sequences; None: all."""
        return self._data(sequences, batch_size).val_dataloader()

    def held_out_parts(self, sequences: int | None, batch_size: int) -> dict[str, Part]:
        """The same by source; of one directory the name is empty."""
        parts = self._data(sequences, batch_size).valid_parts()
        return {name: Part(part.batches) for name, part in parts.items()}

    def _data(self, sequences: int | None, batch_size: int) -> TokenDataModule:
        is_own = Path(self.data.path).resolve() == self.directory.own_data.resolve()
        if is_own and "imported" in self.directory.read_manifest():
            reason = f"is missing: {self.data.location}, of an imported run, has no text"
            remedy = (
                "give text as data_path=..., that was prepared with"
                f" tokenizer.path={self.trained.data.tokenizer_location}"
            )
            raise ConfigError([Problem("data_path", "null", reason, remedy)])
        return TokenDataModule(
            self.data,
            micro_batch_size=1,
            accumulate=1,
            num_steps=1,
            eval_batch_size=batch_size,
            eval_sequences=sequences,
        )


def load_run(config: TrainedRunConfig) -> LoadedRun:
    """Load the run that ``config`` names.

    Raises:
        ConfigError, CheckpointError, DataError: the run cannot be loaded, with the remedy.
    """
    run = open_run(config.runs_dir, str(config.run))
    trained = run.read_config()
    step, model = with_checkpoint(
        run.checkpoints, config.step, lambda step, path: (step, load_model(trained, path))
    )
    device = torch.device(resolve_accelerator(config.accelerator))
    trained = with_found_data(run, trained, config.data_path)
    data = trained.data
    if config.data_path:
        data = replace(data, path=config.data_path, sources={}, stages=[])
    _check_tokenizer(trained, data)
    precision = resolve_precision(config.precision, device.type)
    return LoadedRun(run, trained, step, model.to(device), device, data, precision)


def _check_tokenizer(trained: TrainConfig, data: DataConfig) -> None:
    """Raise DataError if token ids would not mean the same text as in training."""
    own, other = trained.data.summary(), data.summary()
    if own.tokenizer_sha256 != other.tokenizer_sha256:
        raise DataError(
            f"{data.location} was made with another tokenizer than {trained.data.location}: prepare"
            f" it with tokenizer.path={trained.data.tokenizer_location}"
        )
