"""`modtrain export`: a run as a Hugging Face folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modtrain.checkpoint.recovery import with_checkpoint
from modtrain.common.atomic_io import sync
from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.common.reading import read_bytes
from modtrain.data.stream.prepared import TOKENIZER_NAME, IndexSummary
from modtrain.interop.architectures import OWN, architecture, architecture_config, export_problems
from modtrain.interop.config import ExportConfig
from modtrain.interop.model_card import model_card
from modtrain.interop.original_files import TOKENIZER_CONFIG, write_files
from modtrain.interop.prompt_format import PromptFormat
from modtrain.models.transformer import Transformer
from modtrain.training.config import TrainConfig
from modtrain.training.named_runs import open_run
from modtrain.training.plan import derive
from modtrain.training.run_directory import RunDirectory
from modtrain.training.trained_model import load_model, with_found_data


@dataclass(frozen=True)
class ExportedRun:
    """A run at the checkpoint that is exported.

    data: the prepared data that it was trained on.
    """

    directory: RunDirectory
    trained: TrainConfig
    step: int
    model: Transformer
    data: IndexSummary

    @property
    def max_positions(self) -> int:
        """Tokens of a training sequence; of an imported model what it came with."""
        imported = self.directory.read_manifest().get("imported", {})
        return imported.get("max_positions") or self.trained.data.seq_len or self.data.seq_len


def export(config: ExportConfig) -> str:
    """Write the folder ``config.output``, whole or not at all; return a line about it.

    Raises:
        ConfigError: the request is wrong, or the model has no causal decision.
        CheckpointError, DataError: the run cannot be read.
    """
    raise_if_any(config.problems())
    directory = open_run(config.runs_dir, str(config.run))
    trained = directory.read_config()
    raise_if_any(export_problems(trained.model))
    trained = with_found_data(directory, trained, config.data_path)
    data = trained.data.summary()
    step, model = with_checkpoint(
        directory.checkpoints, config.step, lambda step, path: (step, load_model(trained, path))
    )
    run = ExportedRun(directory, trained, step, model, data)
    output = Path(str(config.output))
    with new_folder(output) as folder:
        write_folder(run, folder, config.max_shard_size)
    size = sum(path.stat().st_size for path in output.iterdir())
    kind = architecture(trained.model)
    code = ", with its code: load it with trust_remote_code=True" if kind == OWN else ""
    return f"wrote {output}: step {step} of {config.run} as {kind}, {size:,} bytes{code}"


def write_folder(run: ExportedRun, folder: Path, max_shard_size: str) -> None:
    """Write all files of a run's Hugging Face folder."""
    # transformers is of an extra, and takes seconds to import.
    from modtrain.interop.folder import (  # noqa: PLC0415
        hugging_face_model,
        write_model,
        write_tokenizer,
    )

    capacities = derive(run.trained).capacities_at(max(0, run.step - 1))
    values = architecture_config(run.trained.model, run.max_positions, run.data.eos_id, capacities)
    prompt_format = PromptFormat.read(run.directory.path).of_tokenizer(run.data.tokenizer_sha256)
    values |= prompt_format.config_ids
    write_model(hugging_face_model(run.model, values), folder, max_shard_size)
    if TOKENIZER_CONFIG in prompt_format.files:
        (folder / TOKENIZER_NAME).write_bytes(_tokenizer(run))
    else:
        write_tokenizer(_tokenizer(run), run.data.eos_id, run.max_positions, folder, prompt_format)
    # Last: what the model came with replaces what transformers would write.
    write_files(prompt_format.files_for(architecture(run.trained.model)), folder)
    card = folder / "README.md"
    text = model_card(run.directory, run.trained, run.step, run.data)
    card.write_text(text, encoding="utf-8")
    for file in folder.iterdir():
        # Libraries write weights for their owner alone.
        shutil.copymode(card, file)


@contextmanager
def new_folder(path: Path, key: str = "output") -> Iterator[Path]:
    """Make a folder beside ``path`` that is renamed to it when the block succeeds.

    After an error it is removed. key: of the configuration, which gave the path.

    Raises:
        ConfigError: ``path`` has files by now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id distinguishes two exports at once.
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        try:
            temporary.rename(path)
        except OSError as error:
            reason, remedy = f"cannot be replaced: {error.strerror}", "give another name"
            raise ConfigError([Problem(key, path, reason, remedy)]) from error
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenizer(run: ExportedRun) -> bytes:
    """Return the content of the run's ``tokenizer.json``."""
    path = run.trained.data.tokenizer_path
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != run.data.tokenizer_sha256:
        raise DataError(f"{path} is not the tokenizer that the data was made with: restore it")
    return content
