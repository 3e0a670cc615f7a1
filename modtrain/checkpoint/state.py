"""The state of a model and its optimizer by name, independent of the parallel layout.

Tensors are plain or DTensors. Their keys are made of the names that the bare model gives its
parameters: ``state_dict.<name>``, and ``optimizer.<name>.<key>`` with the keys of the optimizer's
own state (AdamW: exp_avg, exp_avg_sq, step). So a checkpoint of one strategy fits the others.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from modtrain.checkpoint.layout import Manifest
from modtrain.checkpoint.parts import Part, whole_part
from modtrain.checkpoint.plain_data import load_plain
from modtrain.checkpoint.reading import (
    TensorReader,
    format_names,
    read_extra_state,
    translate_load_errors,
)
from modtrain.common.errors import CheckpointError
from modtrain.distributed.process_group import ONE_PROCESS, Ranks
from modtrain.optimizers.registry import spec_of

MODEL, OPTIMIZER, RANK_STATE = "state_dict.", "optimizer.", "ranks.{}.state"
GROUPS, TIED = "optimizer_groups", "tied"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers as ``state_dict.<name>``: views, each once.

    Names of wrappers (DistributedDataParallel, torch.compile, activation checkpointing) are
    removed. Of tied parameters the first name counts; `tied_names` has the others.
    """
    return {MODEL + name: value for name, value in _named(model)[0].items()}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the tied names that `model_tensors` leaves out, each with the name it uses."""
    return _named(model)[1]


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return each group's plain hyperparameters.

    ``params`` are names; ``stateless`` those of them that had no gradient yet.
    """
    names = _names_of(model)
    return [
        {
            **group,
            "params": [names[id(p)] for p in group["params"]],
            "stateless": [names[id(p)] for p in group["params"] if not optimizer.state.get(p)],
        }
        for group in optimizer.param_groups
    ]


def named_state(
    model: nn.Module, optimizer: Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors for `Checkpointer.save`, and their entries of its ``extra_state``.

    They are views, not copies.
    """
    tensors = model_tensors(model)
    extra_state: dict[str, Any] = {TIED: tied_names(model)}
    if optimizer is not None:
        tensors |= {
            f"{OPTIMIZER}{name}.{key}": value
            for name, parameter in _owned(model, optimizer)
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        extra_state[GROUPS] = optimizer_groups(model, optimizer)
    return tensors, extra_state


@dataclass(frozen=True)
class RestoredState:
    """What a checkpoint contained beside the tensors, which were restored in place.

    extra_state: as it was saved. rank_state: this rank's; None if none was saved, or another number
    of ranks, ``world_size``, saved it.
    """

    step: int
    extra_state: Any
    rank_state: Any
    world_size: int


Fill = Callable[[TensorReader, Mapping[str, Any]], None]
"""Puts the tensors of a reader into a model; gets the checkpoint's extra state too."""


def restore(
    path: Path, model: nn.Module, optimizer: Optimizer | None = None, ranks: Ranks = ONE_PROCESS
) -> RestoredState:
    """Put the state of the checkpoint ``path`` into ``model`` and ``optimizer``, in place.

    Each rank reads the parts that it owns. Both may be laid out otherwise than when it was saved.
    Optimizer state is allocated like the parameters; no step is made. Bytes are not checked against
    the manifest: `recover` has done it. Collective over ``ranks``.

    Raises:
        CheckpointError: names are missing or left over, shapes differ, or it cannot be read.
        RankError: another rank failed.
    """

    def fill(reader: TensorReader, extra_state: Mapping[str, Any]) -> None:
        if optimizer is not None:
            _allocate(path, model, optimizer, extra_state.get(GROUPS))
        tensors, _ = named_state(model, optimizer)
        _fill(reader, model, tensors, (MODEL,) if optimizer is None else (MODEL, OPTIMIZER))
        # Last: where the optimizer is another one, its state's names say it better than its groups.
        if optimizer is not None and GROUPS in extra_state:
            _apply_groups(path, model, optimizer, extra_state[GROUPS])

    return load(path, fill, ranks)


def load(path: Path, fill: Fill, ranks: Ranks = ONE_PROCESS) -> RestoredState:
    """Let ``fill`` restore the tensors of the checkpoint ``path``; return the rest; collective.

    Raises:
        CheckpointError: ``fill`` raised it, or the checkpoint cannot be read.
        RankError: another rank failed.
    """
    with ranks.raise_on_all_ranks():
        manifest, extra_state = Manifest.read(path), read_extra_state(path)
        reader = TensorReader(path)
        fill(reader, extra_state if isinstance(extra_state, Mapping) else {})
        is_same_size = manifest.world_size == ranks.world_size
        rank_state = read_rank_state(reader, ranks.rank) if is_same_size else None
        return RestoredState(manifest.step, extra_state, rank_state, manifest.world_size)


def rank_part(state: Any, rank: int) -> Part:
    """Return ``state``, CPU tensors and plain values, as ``rank``'s part of a checkpoint."""
    stream = io.BytesIO()
    torch.save(state, stream)
    content = torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)
    return whole_part(RANK_STATE.format(rank), content)


def read_rank_state(reader: TensorReader, rank: int) -> Any:
    """Return the state that ``rank`` saved, None if it saved none.

    Raises:
        CheckpointError: it is more than plain data.
    """
    if (key := RANK_STATE.format(rank)) not in reader:
        return None
    content = reader.read(key)
    with translate_load_errors(reader.path):
        return load_plain(io.BytesIO(content.numpy().tobytes()))


def load_weights(path: Path, model: nn.Module) -> None:
    """Put the weights of the checkpoint ``path`` into ``model``, in place; nothing else is read.

    Raises:
        CheckpointError: names are missing or left over, shapes differ, or it cannot be read.
    """
    _fill(TensorReader(path), model, model_tensors(model), (MODEL,))


def take(
    path: Path,
    model: nn.Module,
    sources: Mapping[str, str],
    optimizer: Optimizer | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> None:
    """Put tensors of another model's checkpoint ``path`` into ``model``, in place.

    What ``sources`` does not name stays as it is. Each rank reads the parts that it owns.
    Collective over ``ranks``.

    sources: name in ``model`` → name in the checkpoint. optimizer: its state of these parameters is
    taken too, where the checkpoint has some.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or it cannot be read.
        RankError: another rank failed.
    """
    with ranks.raise_on_all_ranks():
        reader = TensorReader(path)
        keys = source_keys(reader, sources, with_optimizer=optimizer is not None)
        if optimizer is not None:
            _allocate_for(model, optimizer, keys)
        own, _ = named_state(model, optimizer)
        pending = dict(keys)
        while pending:
            # The keys of one reading differ, and several layers may take the same one.
            by_source = {source: key for key, source in pending.items()}
            reader.into({source: own[key] for source, key in by_source.items()})
            for key in by_source.values():
                del pending[key]


def source_keys(
    reader: TensorReader, sources: Mapping[str, str], with_optimizer: bool
) -> dict[str, str]:
    """Return the checkpoint's key for each key of the state that is taken from it; see `take`."""
    keys = {MODEL + name: MODEL + source for name, source in sources.items()}
    if not with_optimizer:
        return keys
    kinds: dict[str, list[str]] = {}
    for key in reader:
        if key.startswith(OPTIMIZER):
            name, _, kind = key.removeprefix(OPTIMIZER).rpartition(".")
            kinds.setdefault(name, []).append(kind)
    return keys | {
        f"{OPTIMIZER}{name}.{kind}": f"{OPTIMIZER}{source}.{kind}"
        for name, source in sources.items()
        for kind in kinds.get(source, ())
    }


def _allocate_for(model: nn.Module, optimizer: Optimizer, keys: dict[str, str]) -> None:
    """Allocate state of the parameters that ``keys`` has some for; drop keys that have no place."""
    names, spec = _names_of(model), spec_of(optimizer)
    state_keys = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = spec.initial_state(group, parameter)
            own = {f"{OPTIMIZER}{names[id(parameter)]}.{kind}" for kind in state}
            if own <= keys.keys():
                optimizer.state[parameter] = state
                state_keys |= own
    for key in [key for key in keys if key.startswith(OPTIMIZER) and key not in state_keys]:
        # Of a weight that is frozen now.
        del keys[key]


def _fill(
    reader: TensorReader, model: nn.Module, tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]
) -> None:
    """Fill ``tensors``, which must have the keys that the checkpoint has under ``prefixes``."""
    saved = {key for key in reader if key.startswith(prefixes)}
    tied = {MODEL + name for name in tied_names(model)}
    missing, left_over = sorted(tensors.keys() - saved), sorted(saved - tensors.keys() - tied)
    reasons = [f"lacks {format_names(missing)}"] if missing else []
    if left_over:
        reasons.append(f"contains {format_names(left_over)}, which this model does not have")
    if reasons:
        text = f"{reader.path} {' and '.join(reasons)}: it is of another model or optimizer"
        raise CheckpointError(text)
    reader.into(tensors)


def _named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    while isinstance(model, DistributedDataParallel):
        model = model.module
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for full, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        name = full.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        if id(value) in seen:
            tied[name] = seen[id(value)]
        else:
            seen[id(value)], tensors[name] = name, value
    return tensors, tied


def _names_of(model: nn.Module) -> dict[int, str]:
    return {id(value): name for name, value in _named(model)[0].items()}


def _owned(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Return the optimizer's parameters with their names."""
    names = _names_of(model)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) not in names for p in owned):
        raise ValueError("the optimizer has a parameter that the model does not have")
    return [(names[id(p)], p) for p in owned]


def _allocate(
    path: Path, model: nn.Module, optimizer: Optimizer, saved: list[dict[str, Any]] | None
) -> None:
    """Allocate the state that the saved parameters had."""
    names, spec, stateless = _names_of(model), spec_of(optimizer), set()
    if saved is not None:
        known = {name for group in saved for name in group["params"]}
        unknown = [name for name, _ in _owned(model, optimizer) if name not in known]
        if unknown:
            raise CheckpointError(f"{path} has no optimizer state of {format_names(unknown)}")
        stateless = {name for group in saved for name in group["stateless"]}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[id(parameter)] in stateless:
                optimizer.state.pop(parameter, None)
            elif not optimizer.state.get(parameter):
                optimizer.state[parameter] = spec.initial_state(group, parameter)


def _apply_groups(
    path: Path, model: nn.Module, optimizer: Optimizer, saved: list[dict[str, Any]]
) -> None:
    """Set the saved hyperparameters."""
    origin_of = {name: group for group in saved for name in group["params"]}
    names = _names_of(model)
    for group in optimizer.param_groups:
        origins = [origin_of[names[id(p)]] for p in group["params"]]
        for key in group.keys() - {"params", *_IMPLEMENTATION_KEYS}:
            values = [origin[key] for origin in origins if key in origin]
            if any(value != values[0] for value in values):
                raise CheckpointError(
                    f"{path} was saved with other groups of parameters: {key} is {values[0]} for"
                    " some parameters of a group of this optimizer, and not for others"
                )
            if values:
                group[key] = values[0]


# Implementation choices, which depend on the device, not on the checkpoint.
_IMPLEMENTATION_KEYS = ("fused", "foreach", "capturable", "differentiable")
