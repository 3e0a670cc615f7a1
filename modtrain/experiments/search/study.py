"""A search's study: Optuna's journal, and the settings that all its trials share.

The journal's lock works on a network file system, where SQLite's does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from modtrain.common.errors import CheckpointError, OtherRunError
from modtrain.common.renamed_keys import translate_flat
from modtrain.experiments.search.config import SearchConfig
from modtrain.training.config import MUTABLE_KEYS, TrainConfig
from modtrain.training.run_directory import differences, to_train_config

# Keys that may differ between trials that are compared; eval.sequences changes the loss.
_MUTABLE = (
    *(key for key in MUTABLE_KEYS if key != "eval"),
    *("eval.every", "eval.batch_size"),
)

_PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
}


def open_study(
    directory: Path, config: SearchConfig, shared: TrainConfig | None = None
) -> optuna.Study:
    """Open the study in ``directory``, or create it.

    shared: a resolved trial, at the same point of the space each time, which must match the
        study's other trials. None: this was checked already.

    Raises:
        OtherRunError: the study has another space, other directions, or other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = directory / "study.journal"
    lock = JournalFileSymlinkLock(str(path.resolve()))
    _drop_partial_line(path, lock)
    study = optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(path), lock_obj=lock)),
        directions=["minimize"] * len(config.directions),
        pruner=_PRUNERS[config.pruner](),
        load_if_exists=True,
    )
    now = {"space": config.space, "directions": list(config.directions)}
    _check_unchanged(study, directory, now)
    if shared is not None:
        _check_settings_unchanged(study, directory, shared)
        # The data may have been prepared again in the same place.
        fingerprint = shared.data.summary().fingerprint
        _check_unchanged(study, directory, {"data fingerprint": fingerprint})
    return study


def _check_unchanged(study: optuna.Study, directory: Path, now: dict[str, Any]) -> None:
    """Raise if the study was created with other values than ``now``; store those of a new one."""
    before = study.user_attrs
    if "space" in before:
        before["space"] = translate_flat(before["space"])
    changed = [
        f"  {key}: {before[key]} in the study, {value} now"
        for key, value in now.items()
        if before.get(key, value) != value
    ]
    _raise_if_changed(directory, changed)
    for key, value in now.items():
        if key not in before:
            study.set_user_attr(key, value)


def _check_settings_unchanged(study: optuna.Study, directory: Path, now: TrainConfig) -> None:
    stored = study.user_attrs.get("settings")
    if stored is None:
        content = OmegaConf.to_container(OmegaConf.structured(now))
        study.set_user_attr("settings", content)
        return
    try:
        before = to_train_config(stored)
    except (OmegaConfBaseException, TypeError) as error:
        raise CheckpointError(f"the settings in {directory} cannot be read: {error}") from None
    _raise_if_changed(directory, differences(before, now, "the study", _MUTABLE))


def _raise_if_changed(directory: Path, changed: list[str]) -> None:
    if changed:
        raise OtherRunError(
            "\n".join([f"{directory} has another search:", *changed])
            + "\nremedy: undo these changes to resume it, or give another study= for a new search"
        )


def _drop_partial_line(path: Path, lock: JournalFileSymlinkLock) -> None:
    """Drop a partial last line, left by a power cut, which would make the journal unreadable."""
    if not path.is_file():
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()
