"""Whether a model can start with the weights of another run, and its data with their meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modtrain.checkpoint.reading import TensorReader, format_names
from modtrain.checkpoint.state import MODEL
from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import CheckpointError, DataError, StartingPointError
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.prepared import INDEX_NAME
from modtrain.models.config import ModelConfig
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory, dotted_values
from modtrain.training.starting_point.tensor_map import TensorMap, map_tensors
from modtrain.training.trained_model import with_found_data

# Tensors show it: they are compared by name and shape.
_SHAPES = (
    "d_model",
    "num_layers",
    "vocab_size",
    "d_ff",
    "conv_width",
    "qk_norm",
    "tie_embeddings",
    "mixer",
)
# Without effect on what a weight means.
_INERT = ("init_std", "loss_chunk", "pattern", "capacity", "num_kv_heads", "head_dim")


def check_weights(
    config: TrainConfig, parent: RunDirectory, path: Path, where: str
) -> tuple[TensorMap, tuple[str, ...]]:
    """Return the tensors to take from ``parent``'s checkpoint ``path``, and lines to print.

    config: of the new run, resolved. where: the parent's run and step, for messages.

    Raises:
        StartingPointError: the weights do not fit: every tensor and key that does not.
    """
    trained = parent.read_config()
    if problems := trained.model.problems():
        raise StartingPointError(f"{parent.config} describes no model: {problems[0]}")
    there = parent.path.name
    wrong = _differing_meaning(config.model, trained.model, there)
    remedies: list[str] = []
    if config.init.layers is None and config.model.num_layers != trained.model.num_layers:
        counts = f"{trained.model.num_layers} in {there}, {config.model.num_layers} now"
        wrong.append(f"model.num_layers: {counts}")
        remedies.append("name a source for each layer with init.layers=[0, 1, ...]")
    highest = max((layer for layer in config.init.layers or [] if layer is not None), default=0)
    if highest >= trained.model.num_layers:
        wrong.append(f"init.layers: {there} has no layer {highest}")
    tensors = map_tensors(config.model, trained.model, config.init, there)
    if not remedies:
        wrong += tensors.mismatches
    wrong += _optimizer_mismatches(config, trained, tensors, path)
    wrong += _function_changes(config, trained)
    if config.init.check_tokenizer and (text := tokenizer_mismatch(config, parent, trained)):
        wrong.append(text)
        remedies.append(_TOKENIZER_REMEDY.format(path=trained.data.tokenizer_location))
    if wrong:
        remedies += _remedies(config, trained.model, tensors, there)
        lines = "".join(f"  {line}\n" for line in wrong)
        raise StartingPointError(
            f"{config.name} cannot start with the weights of {where}:\n{lines}"
            f"remedy: {'; '.join(remedies)}"
        )
    _check_saved_names(path, tensors)
    return tensors, _notes(config, trained, tensors, where)


_TOKENIZER_REMEDY = (
    "prepare the data with that tokenizer (modtrain prepare tokenizer.path={path} output=...), or"
    " set init.check_tokenizer=false if its ids mean the same"
)


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """Return what changes the result of equal tensors, and is no choice of a stage of training."""
    return {
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv_heads,
        "head_dim": model.head_width,
        "activation": model.activation,
        "norm_eps": model.norm_eps,
    }


def _differing_meaning(model: ModelConfig, parent: ModelConfig, there: str) -> list[str]:
    own, others = _meaning(model), _meaning(parent)
    return [
        f"model.{key}: {others[key]} in {there}, {value} now"
        for key, value in own.items()
        if others[key] != value
    ]


def _other_differences(config: TrainConfig, trained: TrainConfig) -> list[str]:
    """Return a line for each further key of the model that changes its result."""
    ours, theirs = dotted_values(trained), dotted_values(config)
    both_route = config.model.is_routed and trained.model.is_routed
    skipped = {f"model.{key}" for key in (*_SHAPES, *_INERT, *_meaning(config.model))}
    return [
        f"{key}: {ours.get(key)} -> {theirs.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if key.startswith("model.")
        and key not in skipped
        and (both_route or not key.startswith("model.router."))
        and ours.get(key) != theirs.get(key)
    ]


def _function_changes(config: TrainConfig, trained: TrainConfig) -> list[str]:
    """Find what keeps a converted model from computing what the other run's does."""
    if not config.init.keep_function:
        return []
    changes = [f"{line} (init.keep_function)" for line in _other_differences(config, trained)]
    if trained.model.is_routed:
        changes.append(f"model.pattern: {trained.model.pattern} is routed (init.keep_function)")
    return changes


def _optimizer_mismatches(
    config: TrainConfig, trained: TrainConfig, tensors: TensorMap, path: Path
) -> list[str]:
    """Find what keeps the optimizer's state from being taken."""
    if not config.init.optimizer:
        return []
    then, now = trained.optimizer.name, config.optimizer.name
    if then != now:
        return [f"init.optimizer: the state is of optimizer={then}, and this run has {now}"]
    if not any(key.startswith("optimizer.") for key in TensorReader(path)):
        return [f"init.optimizer: {path} has no state of an optimizer; set init.optimizer=false"]
    if config.strategy.stage is not None and config.optimizer.train != trained.optimizer.train:
        return [
            f"init.optimizer: strategy={config.strategy.name} counts steps once for all tensors,"
            " and optimizer.train differs, so that some have no state: use fsdp, or"
            " init.optimizer=false"
        ]
    if config.strategy.stage is not None and tensors.new:
        return [
            f"init.optimizer: strategy={config.strategy.name} counts steps once for all tensors,"
            f" and {format_names(list(tensors.new))} would be new: use fsdp, or"
            " init.optimizer=false"
        ]
    return []


def tokenizer_mismatch(config: TrainConfig, parent: RunDirectory, trained: TrainConfig) -> str:
    """Return how the data's tokens differ from those of the weights; empty if they do not."""
    data, there = config.data.summary(), trained.data.tokenizer_location
    if data.fingerprint == parent.read_manifest()["data_fingerprint"]:
        return ""
    try:
        expected = with_found_data(parent, trained).data.summary().tokenizer_sha256
    except DataError:
        file = Path(there)
        if is_url(there) or not file.is_file() or (file.parent / INDEX_NAME).exists():
            where = trained.data.location
            return f"tokenizer: unknown, for {where} has not the data of {parent.path}"
        # The data were removed, and the tokenizer was kept.
        expected = file_sha256(file)
    is_same = data.tokenizer_sha256 == expected
    return "" if is_same else f"tokenizer: {config.data.location} has another one than {there}"


def _remedies(
    config: TrainConfig, parent: ModelConfig, tensors: TensorMap, there: str
) -> list[str]:
    remedies = []
    vocabulary = parent.vocab_size
    if vocabulary != config.model.vocab_size:
        remedies.append(f"set model.vocab_size={vocabulary}")
    if config.init.map == "same" and any(_is_routing(line) for line in tensors.mismatches):
        remedies.append("let routers start anew with init.map=pattern")
    if not remedies:
        remedies.append(f"take the model of {there} as well: from={there}, with the keys to change")
    return remedies


def _is_routing(line: str) -> bool:
    parts = (".router.", ".predictor.", ".gate.scale", ".threshold_")
    return any(part in line.partition(":")[0] for part in parts)


def _check_saved_names(path: Path, tensors: TensorMap) -> None:
    """Raise CheckpointError if the checkpoint is not of the run's own configuration."""
    saved = TensorReader(path)
    lacking = [name for name in tensors.taken.values() if MODEL + name not in saved]
    if lacking:
        raise CheckpointError(f"{path} lacks {format_names(lacking)}, which its config.yaml names")


def _notes(
    config: TrainConfig, trained: TrainConfig, tensors: TensorMap, where: str
) -> tuple[str, ...]:
    counts = f"{len(tensors.taken)} tensors taken"
    for names, what in ((tensors.new, "new"), (tensors.left, "left")):
        counts += f", {len(names)} {what}" + (f" ({format_names(list(names), 3)})" if names else "")
    state = ", with the optimizer's state" if config.init.optimizer else ""
    notes = [f"initial weights: {where}{state}: {counts}"]
    if changes := _other_differences(config, trained):
        notes.append(f"the model differs from that one in {', '.join(changes)}")
    return tuple(notes)
