"""A run's directory: its configuration, the code's version, and its results.

``runs/<name>/`` has the same path at every start, so a job that is requeued finds it.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import modtrain
from modtrain.common.atomic_io import acquire_lock, write_text
from modtrain.common.errors import CheckpointError, InUseError, OtherRunError
from modtrain.common.file_mistakes import mistakes_in_file
from modtrain.common.reading import UnreadableError, read_json, read_yaml
from modtrain.common.renamed_keys import flatten, translate
from modtrain.data.remote.urls import is_url
from modtrain.training.config import MUTABLE_KEYS, CheckpointConfig, TrainConfig

VERSION_FILE = "VERSION.json"
"""In a copy of the code: commit and changes of the checkout that it was made from."""

# Testing a lock holds it for a moment, and loader workers may outlive their process.
_LOCK_TIMEOUT = 3.0
_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "webdataset", "numpy", "tokenizers")


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.metrics = path / "metrics.jsonl"
        self.metrics_csv = path / "metrics.csv"
        self.logs = path / "logs"
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.result = path / "result.json"
        self.completed_mark = path / "COMPLETED"
        self.saved_step = path / "saved_step"
        # Of an imported run, which brings its tokenizer and no text.
        self.own_data = path / "data"
        # What begins and ends a text, and the chat template; of a model that came with them.
        self.prompt_format = path / "prompt_format.json"

    @classmethod
    def of(cls, config: TrainConfig) -> RunDirectory:
        """Return the directory of the run that ``config`` names."""
        return cls(Path(config.runs_dir) / str(config.name))

    @property
    def is_complete(self) -> bool:
        """Whether the run has reached its end: then it has a result as well."""
        # Of a directory that may not be searched it is not known.
        return os.path.isfile(self.completed_mark) and os.path.isfile(self.result)  # noqa: PTH113

    def locked(self) -> AbstractContextManager[None]:
        """Lock the run: two processes in one directory would corrupt each other's files.

        Raises:
            InUseError: another process has locked it. The lock ends with its process.
            CheckpointError: the file system has no locks.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        reason = "is in use by another process: wait for it, or give another name="
        in_use = InUseError(f"{self.path} {reason}")
        return acquire_lock(self.path / ".lock", in_use, _LOCK_TIMEOUT)

    def start(
        self,
        config: TrainConfig,
        data_fingerprint: str,
        device: str,
        parent: Mapping[str, Any] | None = None,
    ) -> None:
        """Record this start; the first one freezes the configuration.

        parent: the checkpoint of another run that this one starts from, for the first start.

        Raises:
            CheckpointError: the directory is of a run with another configuration or other data.
        """
        for folder in (self.checkpoints, self.tensorboard, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        started = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "modtrain": modtrain.__version__,
            "code": code_version(),
            "python": platform.python_version(),
            "packages": package_versions(),
            "host": platform.node(),
            "device": device,
            "cpus": os.cpu_count(),
            "data_fingerprint": data_fingerprint,
            "data_path": None if config.data.sources else _absolute(config.data.path),
            "command": sys.argv,
            "checkpoint": asdict(config.checkpoint),
            "log_every": config.log.every,
        }
        manifest: dict[str, Any] = {"data_fingerprint": data_fingerprint, "starts": []}
        if parent is not None:
            manifest["parent"] = dict(parent)
        if self.config.is_file():
            self.check_same(config)
        if self.config.is_file() and self.manifest.is_file():
            manifest = self.read_manifest()
            check_same_data(self.path, manifest["data_fingerprint"], data_fingerprint, config)
        manifest["starts"].append(started)
        write_text(self.manifest, json.dumps(manifest, indent=1))
        if not self.config.is_file():
            write_text(self.path / "command.txt", shlex.join(sys.argv) + "\n")
            # Written last: a directory without it is a run that never started.
            write_text(self.config, OmegaConf.to_yaml(OmegaConf.structured(config)))

    def record_save(self, step: int) -> None:
        """Record beside the checkpoints that there is one, so that their loss is noticed."""
        write_text(self.saved_step, f"{step}\n")

    def check_visible(self) -> None:
        """Raise CheckpointError if ``runs_dir`` is not the directory that rank 0 wrote to."""
        if not self.config.is_file():
            raise CheckpointError(
                f"{self.path} was started by rank 0 and is not visible on {platform.node()}:"
                " runs_dir has to be on a file system that all nodes share"
            )

    def read_config(self) -> TrainConfig:
        """Return the configuration that the run was started with.

        Raises:
            CheckpointError: there is none, or it is not one of this version.
        """
        if not os.path.lexists(self.config):
            raise CheckpointError(f"{self.path} is not a run: it has no config.yaml")
        try:
            return to_train_config(read_yaml(self.config))
        except Exception as error:
            reason = str(error).removeprefix(f"{self.config.name} cannot be read: ")
            if isinstance(error, OmegaConfBaseException):
                fields: Any = OmegaConf.structured(TrainConfig)
                mistakes = mistakes_in_file(self.config, fields, lambda _group: (), "")
                reason = "; ".join(f"{p.key}={p.value}: {p.reason}" for p in mistakes) or reason
            raise CheckpointError(
                f"{self.config} cannot be read: {reason}\n"
                "remedy: restore the file; or remove it and start the run again, which restores it"
                " from the newest checkpoint"
            ) from None

    def read_manifest(self) -> dict[str, Any]:
        """Return the record of the run's data and starts.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        remedy = "start the run again, which restores the file"
        return _read_strictly(self.manifest, read_manifest, remedy)

    def read_result(self) -> dict[str, Any]:
        """Return the result of the complete run.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        remedy = f"remove {self.completed_mark}, and start the run again, which writes it"
        return _read_strictly(self.result, read_json, remedy)

    def retention(self) -> CheckpointConfig:
        """Return the checkpoint configuration of the run's newest start.

        Raises:
            CheckpointError: the directory is not a run.
        """
        config = self.read_config().checkpoint
        starts = self.read_manifest()["starts"] if self.manifest.is_file() else []
        stored = {"checkpoint": starts[-1].get("checkpoint", {})} if starts else {}
        return replace(config, **translate(stored).get("checkpoint", {}))

    def data_paths(self) -> list[str]:
        """Return where the run's data were at its starts, the newest first, with absolute paths.

        Raises:
            CheckpointError: the record of the starts is damaged.
        """
        starts = self.read_manifest()["starts"] if self.manifest.is_file() else []
        paths = [start.get("data_path") for start in reversed(starts)]
        return [*dict.fromkeys(path for path in paths if isinstance(path, str))]

    def check_same(self, config: TrainConfig) -> None:
        """Raise OtherRunError with each key that may not change and differs from the run's own."""
        check_same(self.read_config(), config, f"{self.path} is a run", "the run")

    def complete(self, result: dict[str, Any]) -> None:
        """Write the result, then mark the run as complete."""
        write_text(self.result, json.dumps(result, indent=1))
        write_text(self.completed_mark, "")


def _read_strictly(
    path: Path, read: Callable[[Path], dict[str, Any]], remedy: str
) -> dict[str, Any]:
    try:
        return read(path)
    except UnreadableError as error:
        raise CheckpointError(f"{path.parent}/{error}\nremedy: {remedy}") from None


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).absolute())


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of a run's ``manifest.json``.

    Raises:
        UnreadableError: it cannot be read, or is no run's.
    """
    content = read_json(path)
    if not isinstance(content.get("data_fingerprint"), str):
        raise UnreadableError(f"{path.name} lacks data_fingerprint")
    starts = content.get("starts")
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise UnreadableError(f"{path.name} lacks the list of starts")
    return content


def check_same_data(path: Path, then: str, now: str, config: TrainConfig) -> None:
    """Raise CheckpointError unless ``path`` was trained on the data that ``config`` names.

    then, now: fingerprints of the data.
    """
    if then != now:
        raise CheckpointError(
            f"{path} was trained on other data than {config.data.location} has now:"
            f" {then[:12]} then, {now[:12]} now. Give another name=, or restore the first data"
        )


def check_resumable(config: TrainConfig, resolved: TrainConfig) -> None:
    """Raise CheckpointError if the run's directory has another configuration, or cannot be read.

    config: as given. resolved: the same after `resolve`.
    """
    run = RunDirectory.of(config)
    if run.config.is_file():
        if config.precision == "auto":
            # The device on which the run started decided it.
            resolved = replace(resolved, precision=run.read_config().precision)
        # Whether other stages are ahead of where the run is shows when it starts.
        run.check_same(with_stages_of(resolved, run.read_config()))


def with_stages_of(config: TrainConfig, other: TrainConfig) -> TrainConfig:
    """Return ``config`` with the stages of ``other``'s mixture of data."""
    return replace(config, data=replace(config.data, stages=other.data.stages))


def check_same(before: TrainConfig, now: TrainConfig, subject: str, where: str) -> None:
    """Raise OtherRunError with each key that may not change between two starts, and differs.

    subject: what ``before`` is of, as the beginning of a sentence. where: the same, in short.
    """
    free: Sequence[str] = MUTABLE_KEYS
    if now.model.depends_on_micro_batch:
        free = [key for key in free if key != "batch.micro_batch_size"]
    changed = differences(before, now, where, free)
    if changed:
        raise OtherRunError(
            "\n".join([f"{subject} with another configuration:", *changed])
            + "\nremedy: undo these changes to resume it, or give another name= for a new run"
        )


def to_train_config(content: Any) -> TrainConfig:
    """Return the configuration with the values ``content``; missing keys have their defaults.

    Raises:
        OmegaConfBaseException: ``content`` is not one of this version.
        TypeError: it is not a configuration.
    """
    if not isinstance(content, Mapping):
        raise TypeError("it is not a run's configuration")
    loaded = OmegaConf.merge(OmegaConf.structured(TrainConfig), translate(content))
    config = OmegaConf.to_object(loaded)
    if not isinstance(config, TrainConfig):
        raise TypeError("it is not a run's configuration")
    return config


def differences(
    before: TrainConfig, now: TrainConfig, where: str, free: Sequence[str] = MUTABLE_KEYS
) -> list[str]:
    """Return a line for each key that differs, with both values.

    where: name of ``before`` in the text. free: keys that may differ, with all keys below them; in
    one that has a ``*`` it stands for any name.
    """
    ours, theirs = dotted_values(before), dotted_values(now)
    return [
        f"  {key}: {ours.get(key)} in {where}, {theirs.get(key)} now"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
        and not any(fnmatchcase(key, one) or key.startswith(one + ".") for one in free)
    ]


def dotted_values(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration's values by dotted key."""
    content: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return flatten(content)


def package_versions() -> dict[str, str]:
    """Return the versions of the main packages."""
    return {name: metadata.version(name) for name in _PACKAGES}


def code_version() -> dict[str, str] | None:
    """Return commit and uncommitted changes of the checkout that this code is in or a copy of."""
    root = Path(modtrain.__file__).parents[1]
    if (root / VERSION_FILE).is_file():
        version: dict[str, str] | None = json.loads((root / VERSION_FILE).read_text())
        return version
    if not (root / ".git").exists():
        # A container image sets this variable.
        commit = os.environ.get("MODTRAIN_REVISION")
        return {"commit": commit, "diff": ""} if commit else None

    def git(*arguments: str) -> str:
        # The user's files may be in any encoding.
        return ask_git(root, *arguments).decode(errors="replace")

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "diff": git("diff", "HEAD")[:1_000_000]}
    except (OSError, subprocess.SubprocessError) as error:
        words = " ".join((getattr(error, "stderr", None) or b"").decode(errors="replace").split())
        _log.warning("the code's version is not recorded: %s", words or error)
        return None


def ask_git(root: Path, *arguments: str) -> bytes:
    """Return what git prints of the checkout ``root``, whoever owns it.

    Git refuses another user's repository, whose configuration could name programs to run; this
    process runs the code of that repository already.

    Raises:
        OSError, subprocess.SubprocessError: git is missing, fails, or takes too long.
    """
    command = ["git", "-c", f"safe.directory={root.resolve()}", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout  # noqa: S603
