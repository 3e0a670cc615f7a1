"""A model's and its optimizer's state by name, whatever the layout, and back in place.

Tensors are plain or DTensors. Their keys are made of the names that the bare model gives its
parameters: ``state_dict.<name>``, and ``optimizer.<name>.<exp_avg, exp_avg_sq or step>``. So a
checkpoint of one strategy fits the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

from modtrain.checkpoint.layout import Manifest
from modtrain.checkpoint.rank_state import read_rank_state
from modtrain.checkpoint.reading import TensorReader, listed, read_rest
from modtrain.common.errors import CheckpointError
from modtrain.distributed.process_group import Ranks

MODEL, OPTIMIZER = "state_dict.", "optimizer."
GROUPS, TIED = "optimizer_groups", "tied"

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and kept buffers as ``state_dict.<name>``, each once: views, not copies.

    Names of wrappers (DistributedDataParallel, torch.compile, activation checkpointing) are left
    out. Of a tied pair the name that comes first stands; `tied_names` has the other.
    """
    return {MODEL + name: value for name, value in _named(model)[0].items()}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the names that `model_tensors` leaves out, each with the one that stands for it."""
    return _named(model)[1]


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return AdamW's tensors as ``optimizer.<name>.<exp_avg, exp_avg_sq or step>``: views."""
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in _owned(model, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return each group's plain hyperparameters.

    ``params`` are names; ``stateless`` those of them that had no gradient yet.
    """
    names = _names_of(model)
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[id(p)] for p in group["params"]],
            "stateless": [names[id(p)] for p in group["params"] if not optimizer.state.get(p)],
        }
        for group in optimizer.param_groups
    ]


def named_state(
    model: nn.Module, optimizer: Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors for `Saver.save`, and what belongs into its ``rest``."""
    tensors = model_tensors(model)
    rest: dict[str, Any] = {TIED: tied_names(model)}
    if optimizer is not None:
        tensors |= optimizer_tensors(model, optimizer)
        rest[GROUPS] = optimizer_groups(model, optimizer)
    return tensors, rest


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held beside the tensors that were restored in place.

    rest: as it was saved. rank_state: this rank's; None where another number of ranks saved it,
    ``world_size``, or none was saved.
    """

    step: int
    rest: Any
    rank_state: Any
    world_size: int


def restore(
    path: Path, model: nn.Module, optimizer: Optimizer | None = None, ranks: Ranks | None = None
) -> Restored:
    """Put the state of the checkpoint ``path`` into ``model`` and ``optimizer``, in place.

    Each rank reads the parts that it holds. Both may be laid out otherwise than when it was saved.
    What an optimizer keeps is allocated as the parameters are; it takes no step. Bytes are not
    checked against the manifest: `recover` has done it.

    ranks: fail together; collective. None: this process alone.

    Raises:
        CheckpointError: names are missing or left over, shapes differ, or it cannot be read.
        RankError: another rank could not.
    """
    rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    with nullcontext() if ranks is None else ranks.raise_on_all_ranks():
        restored = _restore(path, model, optimizer, rank, world_size)
    return restored  # noqa: RET504


def _restore(
    path: Path, model: nn.Module, optimizer: Optimizer | None, rank: int, world_size: int
) -> Restored:
    manifest, rest, reader = Manifest.read(path), read_rest(path), TensorReader(path)
    if optimizer is not None:
        _allocate(path, model, optimizer, rest.get(GROUPS) if isinstance(rest, Mapping) else None)
    tensors, _ = named_state(model, optimizer)
    prefixes = (MODEL,) if optimizer is None else (MODEL, OPTIMIZER)
    saved = (key for key in reader if key.startswith(prefixes))
    _check_names(path, tensors, saved, {MODEL + name for name in tied_names(model)})
    reader.into(tensors)
    own = read_rank_state(reader, rank) if manifest.world_size == world_size else None
    return Restored(manifest.step, rest, own, manifest.world_size)


def load_weights(path: Path, model: nn.Module) -> None:
    """Put the weights of the checkpoint ``path`` into ``model``, in place; nothing else is read.

    Raises:
        CheckpointError: names are missing or left over, shapes differ, or it cannot be read.
    """
    reader = TensorReader(path)
    tensors = model_tensors(model)
    saved = (key for key in reader if key.startswith(MODEL))
    _check_names(path, tensors, saved, {MODEL + name for name in tied_names(model)})
    reader.into(tensors)


def _check_names(path: Path, wanted: Iterable[str], saved: Iterable[str], tied: set[str]) -> None:
    wanted, saved = set(wanted), set(saved)
    missing, left = sorted(wanted - saved), sorted(saved - wanted - tied)
    said = [f"lacks {listed(missing)}"] if missing else []
    said += [f"holds {listed(left)}, which the model here does not have"] if left else []
    if said:
        raise CheckpointError(f"{path} {' and '.join(said)}: it is of another model or optimizer")


def _named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    while isinstance(model, DistributedDataParallel):
        model = model.module
    found: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for full, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        name = _plain_name(full)
        if id(value) in seen:
            tied[name] = seen[id(value)]
        else:
            seen[id(value)], found[name] = name, value
    return found, tied


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


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
    """Take over hyperparameters, and make room for the state that the saved parameters had."""
    stateless: set[str] = set()
    if saved is not None:
        _apply_groups(path, model, optimizer, saved)
        stateless = {name for group in saved for name in group["stateless"]}
    names = _names_of(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[id(parameter)] in stateless:
                optimizer.state.pop(parameter, None)
            elif not optimizer.state.get(parameter):
                optimizer.state[parameter] = _fresh(optimizer, group, parameter)


def _apply_groups(
    path: Path, model: nn.Module, optimizer: Optimizer, saved: list[dict[str, Any]]
) -> None:
    origin_of = {name: group for group in saved for name in group["params"]}
    names = _names_of(model)
    unknown = [name for name, _ in _owned(model, optimizer) if name not in origin_of]
    if unknown:
        raise CheckpointError(f"{path} has no optimizer's state of {listed(unknown)}")
    for group in optimizer.param_groups:
        origins = [origin_of[names[id(p)]] for p in group["params"]]
        for key in group.keys() - {"params", *_HOW}:
            values = [origin[key] for origin in origins if key in origin]
            if any(value != values[0] for value in values):
                raise CheckpointError(
                    f"{path} was saved with other groups of parameters: {key} is {values[0]} for"
                    " some of a group here, and not for others"
                )
            if values:
                group[key] = values[0]


# How a step is computed is this process's affair: it depends on the device.
_HOW = ("fused", "foreach", "capturable", "differentiable")


def _fresh(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step, as torch's Adam makes it."""
    if not isinstance(optimizer, Adam):
        raise CheckpointError(
            f"the state of {type(optimizer).__name__} cannot be allocated: use AdamW"
        )
    like: Callable[[], Tensor] = lambda: torch.zeros_like(  # noqa: E731
        parameter.detach(), memory_format=torch.preserve_format
    )
    # On the host unless the step itself runs on the device (torch.optim.Adam._init_group).
    device = parameter.device if group["capturable"] or group["fused"] else torch.device("cpu")
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    state |= {"exp_avg": like(), "exp_avg_sq": like()}
    if group["amsgrad"]:
        state["max_exp_avg_sq"] = like()
    return state
