"""A trained run's weights, and the prepared data that its token ids belong to."""

from __future__ import annotations

from pathlib import Path

from modtrain.checkpoint.state import load_weights
from modtrain.common.errors import DataError
from modtrain.data.stream.index import IndexSummary
from modtrain.models.transformer import Transformer
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory


def load_model(config: TrainConfig, path: Path) -> Transformer:
    """Return the model of ``config`` with the weights of the checkpoint ``path``, on the CPU."""
    model = Transformer(config.model, seed=config.seed)
    load_weights(path, model)
    return model.eval()


def training_data(run: RunDirectory, trained: TrainConfig) -> IndexSummary:
    """Return the summary of the data that ``run`` was trained on.

    Raises:
        DataError: the data is missing, or is another one now.
    """
    summary = trained.data.summary()
    if summary.fingerprint != run.read_manifest()["data_fingerprint"]:
        raise DataError(
            f"{trained.data.location} has other data now than {run.path} was trained on: prepare"
            " the same data again; its tokenizer is the run's"
        )
    return summary
