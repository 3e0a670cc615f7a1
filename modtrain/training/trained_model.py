"""A trained run's weights, and the prepared data that its token ids belong to."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from modtrain.checkpoint.state import load_weights
from modtrain.common.errors import DataError
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
    at ``data_path``, to which they were moved, or in the directory of an imported run itself.

    Raises:
        DataError: they are at none of them.
    """
    fingerprint = run.read_manifest()["data_fingerprint"]
    own = trained.data
    places = [own]
    if not own.sources:
        paths = [*([data_path] if data_path else []), *run.data_paths(), str(run.own_data)]
        places += [replace(own, path=path) for path in dict.fromkeys(paths)]
    for data in places:
        with suppress(DataError):
            if data.summary().fingerprint == fingerprint:
                return replace(trained, data=data)
    if data_path is not None and not own.sources:
        given = replace(own, path=data_path)
        given.summary()
        raise DataError(
            f"{data_path} has other data than {run.path} was trained on\nremedy: give the"
            " directory of its own as data_path=..., or prepare the same data again"
        )
    directory = "give the directory in which they are now as data_path=..."
    remedy = f"{'put them back' if own.sources else directory}, or prepare the same data again"
    try:
        own.summary()
    except DataError as error:
        raise DataError(f"{error}\nremedy: {remedy}") from None
    raise DataError(
        f"{own.location} has other data now than {run.path} was trained on\nremedy: {remedy}"
    )
