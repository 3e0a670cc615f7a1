"""A trained run's weights, and the prepared data that its token ids belong to."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from modtrain.checkpoint.state import load_weights
from modtrain.common.errors import DataError
from modtrain.data.stream.index import read_summary
from modtrain.models.transformer import Transformer
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory


def load_model(config: TrainConfig, path: Path) -> Transformer:
    """Return the model of ``config`` with the weights of the checkpoint ``path``, on the CPU."""
    model = Transformer(config.model, seed=config.seed)
    load_weights(path, model)
    return model.eval()


def with_found_data(
    run: RunDirectory, trained: TrainConfig, data_path: str | None = None
) -> TrainConfig:
    """Return ``trained`` with the path at which the data that ``run`` was trained on are now.

    They are known by their fingerprint: at the path of the configuration, at that of a later start,
    or at ``data_path``, to which they were moved.

    Raises:
        DataError: they are at none of them.
    """
    fingerprint = run.read_manifest()["data_fingerprint"]
    own = trained.data.path
    paths = [own, *([data_path] if data_path else []), *run.data_paths()]
    for path in dict.fromkeys(paths):
        with suppress(DataError):
            if read_summary(path).fingerprint == fingerprint:
                return replace(trained, data=replace(trained.data, path=path))
    remedy = "give the place of the run's data as data_path=..., or prepare the same data again"
    try:
        read_summary(own)
    except DataError as error:
        raise DataError(f"{error}\nremedy: {remedy}") from None
    raise DataError(f"{own} has other data now than {run.path} was trained on\nremedy: {remedy}")
