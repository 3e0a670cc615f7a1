"""`modtrain import`: a model of a Hugging Face folder or a GGUF file as a run."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import modtrain
from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.layout import checkpoint_path
from modtrain.checkpoint.state import named_state
from modtrain.common.atomic_io import write_bytes, write_json, write_text
from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.common.reading import read_bytes
from modtrain.data.config import DataConfig
from modtrain.data.prepare.tokenizer import check_tokenizer, parse_tokenizer
from modtrain.data.stream.index_json import index_content, read_summary
from modtrain.data.stream.prepared import (
    INDEX_NAME,
    SPLITS,
    TOKENIZER_NAME,
    IndexSummary,
    Shard,
    SplitSummary,
)
from modtrain.distributed.process_group import ONE_PROCESS
from modtrain.interop.config import ImportConfig
from modtrain.interop.export import new_folder
from modtrain.interop.names import tensor_shapes, weight_names
from modtrain.interop.original_files import CONFIG_NAME, config_ids, token_ids
from modtrain.interop.prompt_format import ORIGIN, PromptFormat
from modtrain.interop.source import Source, open_folder
from modtrain.models.config import ModelConfig
from modtrain.models.transformer import Transformer
from modtrain.training.config import BatchConfig, BudgetConfig, TrainConfig
from modtrain.training.run_directory import RunDirectory, code_version, package_versions

_LONGEST_SEQUENCE = 2048
_SHOWN = 8
_LARGEST_UINT16_VOCAB = 1 << 16


def import_model(config: ImportConfig) -> str:
    """Write the run ``config.name``, whole or not at all; return a line about it.

    Raises:
        ConfigError: the request is wrong, or the model's configuration cannot be represented; names
            every key.
        DataError: a file of the model is damaged, or does not fit its configuration.
    """
    raise_if_any(config.problems())
    # transformers is of an extra, and takes seconds to import.
    from modtrain.interop.imported_config import model_config, parse_config  # noqa: PLC0415

    path = Path(str(config.source))
    with ExitStack() as stack:
        source = open_source(path, stack)
        parsed = parse_config(source.config, str(path))
        model, problems = model_config(parsed)
        raise_if_any(problems)
        tokenizer = _tokenizer(config, source, path)
        vocab_size, eos_id = _tokenizer_ids(tokenizer, config.tokenizer or str(path), source)
        if vocab_size > model.vocabulary:
            raise DataError(
                f"{path}: vocab_size={model.vocabulary} is smaller than its tokenizer's"
                f" {vocab_size}\nremedy: give the model's own with tokenizer=..."
            )
        names = _matching_names(model, source, path)
        transformer = _filled(model, source, names)
        positions = int(parsed.max_position_embeddings)
        seq_len = config.seq_len or min(positions, _LONGEST_SEQUENCE)
        trained = _run_config(config, model, seq_len)
        origin = {
            "source": str(path),
            "model_type": parsed.model_type,
            "max_positions": positions,
            "files": source.files,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        }
        with new_folder(RunDirectory.of(trained).path, "name") as folder:
            _write_data(RunDirectory(folder).own_data, tokenizer, (vocab_size, eos_id), seq_len)
            _with_origin(source.prompt_format(tokenizer), parsed, origin).write(folder)
            _write_run(folder, trained, transformer, origin)
    count = sum(p.numel() for p in transformer.parameters())
    return f"wrote {RunDirectory.of(trained).path}: {parsed.model_type}, {count:,} parameters"


def _with_origin(
    prompt_format: PromptFormat, parsed: Any, origin: Mapping[str, Any]
) -> PromptFormat:
    """Return the format with what an export needs. parsed: transformers' configuration."""
    files = {**prompt_format.files, CONFIG_NAME: config_ids(parsed)}
    known = {key: origin[key] for key in ORIGIN}
    return replace(prompt_format, files=files, origin=known)


def _run_config(config: ImportConfig, model: ModelConfig, seq_len: int) -> TrainConfig:
    """Return the run's configuration; its budget is the least that there is."""
    data = RunDirectory(Path(config.runs_dir, str(config.name))).own_data
    return TrainConfig(
        name=config.name,
        runs_dir=config.runs_dir,
        precision="fp32",
        model=model,
        data=DataConfig(path=str(data), seq_len=seq_len),
        budget=BudgetConfig(steps=1),
        batch=BatchConfig(tokens=seq_len, micro_batch_size=1),
    )


def open_source(path: Path, stack: ExitStack) -> Source:
    """Open a Hugging Face folder or a GGUF file; ``stack`` closes it.

    Raises:
        DataError: it cannot be read.
    """
    if path.is_dir():
        return open_folder(path, stack)
    if find_spec("gguf") is None:
        reason, remedy = "needs the package gguf: it is missing", "pip install 'modtrain[hf]'"
        raise ConfigError([Problem("source", path, reason, remedy)])
    from modtrain.interop.gguf_file import open_gguf  # noqa: PLC0415  (imports the extra)

    return open_gguf(path)


def _tokenizer(config: ImportConfig, source: Source, path: Path) -> bytes:
    if config.tokenizer is not None:
        return read_bytes(Path(config.tokenizer))
    if source.tokenizer is None:
        raise DataError(
            f"{path}: has no {TOKENIZER_NAME}\nremedy: give one with tokenizer=FILE; transformers"
            " writes it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return source.tokenizer


def _tokenizer_ids(content: bytes, name: str, source: Source) -> tuple[int, int]:
    """Return the vocabulary's size and the end token: the first that the model declares."""
    parsed = parse_tokenizer(content, name)
    declared = token_ids(source.config.get("eos_token_id"))
    own = [number for number in declared if number < 2**31 and parsed.id_to_token(number)]
    try:
        return check_tokenizer(content, name, own[0] if own else None)
    except DataError as error:
        raise DataError(
            f"{name}: has no end-of-document token that is known by its name, and the model's"
            " configuration declares none\nremedy: give the number of the token that ends a text as"
            " eos_token_id in config.json"
        ) from error


def _matching_names(model: ModelConfig, source: Source, path: Path) -> dict[str, str]:
    """Return our name and theirs of each tensor to read, once all are there in the right shapes.

    Raises:
        DataError: names every tensor that is missing, left over or of another shape.
    """
    expected = tensor_shapes(model)
    names = {ours: theirs for ours, theirs in weight_names(model).items() if ours in expected}
    wanted = {theirs: expected[ours] for ours, theirs in names.items()}
    # Old folders store the angles, and some the shared head once more.
    extra = {key for key in source.shapes if key.endswith(".rotary_emb.inv_freq")}
    if model.tie_embeddings:
        extra |= {"lm_head.weight"}
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        both = head in source.shapes and embedding in source.shapes
        if both and not torch.equal(source.read(head), source.read(embedding)):
            raise DataError(
                f"{path}: tie_word_embeddings=true, and {head} differs from {embedding}"
            )
    lines = [f"  {name}: is missing" for name in wanted if name not in source.shapes]
    lines += [
        f"  {n}: is not part of it" for n in source.shapes if n not in wanted and n not in extra
    ]
    lines += [
        f"  {name}: is {source.shapes[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    if lines:
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        head_line = f"{path}: the weights are not those of its configuration:"
        raise DataError("\n".join([head_line, *lines[:_SHOWN], *more]))
    return names


def _filled(config: ModelConfig, source: Source, names: Mapping[str, str]) -> Transformer:
    model = Transformer(config)
    targets = model.state_dict()
    for ours, theirs in names.items():
        value = source.read(theirs).to(torch.float32)
        if not bool(value.isfinite().all()):
            raise DataError(f"{theirs} has values that are not finite: take another copy")
        targets[ours].copy_(value)
    return model.eval()


def _write_data(folder: Path, tokenizer: bytes, ids: tuple[int, int], seq_len: int) -> None:
    """Write a prepared directory with the tokenizer, and without text."""
    vocab_size, eos_id = ids
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    write_bytes(folder / TOKENIZER_NAME, tokenizer, folder)
    summary = IndexSummary(
        seq_len=seq_len,
        vocab_size=vocab_size,
        eos_id=eos_id,
        dtype="uint16" if vocab_size <= _LARGEST_UINT16_VOCAB else "uint32",
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        fingerprint="",
        num_files=0,
        flaws={},
        splits={split: SplitSummary(0, 0, 0, 0, 0) for split in SPLITS},
    )
    none: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    write_json(folder / INDEX_NAME, index_content(summary, none), folder)


def _write_run(
    folder: Path, trained: TrainConfig, model: Transformer, origin: dict[str, Any]
) -> None:
    """Write a run that has its first checkpoint, of step 0."""
    run = RunDirectory(folder)
    for path in (run.checkpoints, run.tensorboard, run.logs):
        path.mkdir()
    tensors, extra_state = named_state(model)
    with Checkpointer(ONE_PROCESS) as checkpointer:
        checkpointer.save(
            checkpoint_path(run.checkpoints, 0), tensors, extra_state, 0, blocking=True
        )
    manifest = {
        "data_fingerprint": read_summary(run.own_data).fingerprint,
        "starts": [],
        "imported": {
            **origin,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "modtrain": modtrain.__version__,
            "code": code_version(),
            "packages": package_versions(),
        },
    }
    write_text(run.manifest, json.dumps(manifest, indent=1))
    run.record_save(0)
    # Written last, as for a run that is trained.
    write_text(run.config, OmegaConf.to_yaml(OmegaConf.structured(trained)))
