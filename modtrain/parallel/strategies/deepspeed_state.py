"""What a ZeRO engine holds, by the parameters' names: weights, optimizer state, gradients.

Each rank steps a part of each parameter, in fp32: of stages 1 and 2 a piece of one flat tensor, of
stage 3 an even share with padding behind. Everything here goes by those parts, whatever the stage.
A frozen weight is none of the optimizer's: stages 1 and 2 leave it whole on every rank, stage 3
shares it out as the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modtrain.checkpoint.state import MODEL, OPTIMIZER
from modtrain.common.errors import CheckpointError
from modtrain.optimizers.registry import spec_of


class Fragment(NamedTuple):
    """The part of a parameter that this rank steps: ``start`` counts the flattened elements."""

    start: int
    values: Tensor


def fragment(engine: Any, parameter: Any, moment: str | None = None) -> Fragment | None:
    """Return this rank's part of the fp32 weight, or of a ``moment``; None where it has none.

    Of stages 1 and 2 it is what is stepped, of stage 3 it may be a copy. Of a frozen weight it is
    what is computed with, which stages 1 and 2 have whole on every rank.
    """
    utils = import_module("deepspeed.utils")
    if not parameter.requires_grad:
        if hasattr(parameter, "ds_id"):
            return _without_padding(parameter, parameter.ds_tensor.detach())
        return Fragment(0, parameter.detach().view(-1))
    if hasattr(parameter, "ds_id"):
        if moment is None:
            return _without_padding(parameter, utils.safe_get_local_fp32_param(parameter))
        values = utils.safe_get_local_optimizer_state(parameter, moment)
        return _without_padding(parameter, values)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # DeepSpeed's own access by moment knows the first group of parameters alone: it is set up when
    # that one has made its first step, and the others have not.
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    source = flat if moment is None else engine.optimizer.optimizer.state[flat][moment]
    address = mapping.hp_fragment_address
    values = source.narrow(0, address.start, address.numel)
    return Fragment(mapping.lp_fragment_address.start, values)


def set_fragment(engine: Any, parameter: Any, whole: Tensor, moment: str | None = None) -> None:
    """Set this rank's part from the whole tensor, of the parameter's shape."""
    utils = import_module("deepspeed.utils")
    there = fragment(engine, parameter, moment)
    if there is None:
        return
    start, count = there.start, there.values.numel()
    new = whole.flatten()[start : start + count].to(there.values)
    if not hasattr(parameter, "ds_id") or not parameter.requires_grad:
        there.values.copy_(new)
        return
    new = nn.functional.pad(new, (0, parameter.ds_tensor.numel() - count))
    if moment is None:
        utils.safe_set_local_fp32_param(parameter, new)
    else:
        utils.safe_set_local_optimizer_state(parameter, new, moment)


def _without_padding(parameter: Any, values: Tensor) -> Fragment:
    """Cut off what fills up the last rank's part in stage 3."""
    start = dist.get_rank() * parameter.ds_tensor.numel()
    return Fragment(start, values[: max(0, parameter.ds_numel - start)])


@torch.no_grad()
def clip_gradients(
    engine: Any, groups: Sequence[Sequence[nn.Parameter]], limit: float | None
) -> list[Tensor]:
    """Scale down each group's averaged gradient to the norm ``limit``; return the norms before.

    Between the backward pass of a step's last micro-batch and the engine's step. DeepSpeed's own
    clipping has one norm for all parameters. As `torch.nn.utils.clip_grad_norm_` otherwise, with
    which a model of one group agrees.
    """
    optimizer = engine.optimizer
    groups = [[parameter for parameter in group if parameter.requires_grad] for group in groups]
    if engine.zero_optimization_stage() < 3:
        # Copies to the host may be under way.
        optimizer._wait_for_offload_copies()
    device = torch.device(engine.device)
    gradients = [[g for p in group if (g := _gradient(p)) is not None] for group in groups]
    squares = [
        torch.stack([torch.linalg.vector_norm(g).to(device) for g in group]).square().sum()
        if group
        else torch.zeros((), device=device)
        for group in gradients
    ]
    total = torch.stack(squares)
    dist.all_reduce(total)
    norms = list(total.sqrt().unbind())
    if limit is None:
        return norms
    for group, norm in zip(groups, norms, strict=True):
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter in group:
            _scale_gradient(parameter, factor)
    return norms


def _gradient(parameter: Any) -> Tensor | None:
    """Return this rank's part of the averaged gradient."""
    utils = import_module("deepspeed.utils")
    if hasattr(parameter, "ds_id"):
        return _without_padding(parameter, utils.safe_get_local_grad(parameter)).values
    if parameter._hp_mapping is None:
        return None
    gradient: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    return gradient


def _scale_gradient(parameter: Any, factor: Tensor) -> None:
    utils = import_module("deepspeed.utils")
    if hasattr(parameter, "ds_id"):
        gradient = utils.safe_get_local_grad(parameter)
        utils.safe_set_local_grad(parameter, gradient * factor.to(gradient.device))
    elif (gradient := _gradient(parameter)) is not None:
        gradient.mul_(factor.to(gradient.device))


@torch.no_grad()
def tensors(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's share of the weights and the optimizer's state by name, on the host.

    model: the part of the engine's module whose names count. Keys are as in
    `modtrain.checkpoint`: ``state_dict.<name>``, which buffers are among, and
    ``optimizer.<name>.<moment or step>``; before the first step there is no optimizer state, and a
    frozen weight never has one. Parameter i goes to rank i modulo the number of ranks: all shares
    together are what the plain optimizer and a whole model have, bit by bit. Collective; one
    parameter at a time.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    made, moments = _steps(engine), _moments(engine)
    state: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        owner = number % world_size
        steps = made if parameter.requires_grad else 0.0
        for moment in (None, *moments) if steps else (None,):
            whole = _gathered(engine, parameter, moment, owner)
            if whole is not None:
                state[_key(name, moment)] = whole
        if steps and rank == owner:
            state[_key(name, "step")] = torch.tensor(float(steps))
    if rank == 0:
        state |= {_key(name): buffer.cpu().clone() for name, buffer in _buffers(model)}
    return state


def _key(name: str, moment: str | None = None) -> str:
    return f"{MODEL}{name}" if moment is None else f"{OPTIMIZER}{name}.{moment}"


def _gathered(engine: Any, parameter: Any, moment: str | None, owner: int) -> Tensor | None:
    """Return the whole tensor on rank ``owner``, None on the others."""
    if not parameter.requires_grad and not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu().clone() if dist.get_rank() == owner else None
    shape = getattr(parameter, "ds_shape", parameter.shape)
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=engine.device)
    part = fragment(engine, parameter, moment)
    if part is not None:
        whole[part.start : part.start + part.values.numel()] = part.values
    # Bits, each from one rank: as numbers -0.0 + 0.0 were 0.0, and NaNs what they like.
    dist.reduce(whole.view(torch.int32), dst=owner)
    return whole.view(shape).cpu() if dist.get_rank() == owner else None


@torch.no_grad()
def put(
    engine: Any, model: nn.Module, state: Mapping[str, Tensor], is_partial: bool = False
) -> None:
    """Set this rank's parts to ``state``, by the keys of `tensors`; `publish` has to follow.

    state: it may read a tensor when it is asked for. Without a ``step`` only weights are set.
    is_partial: what it does not have stays as it is.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the steps differ.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    keys = [_key(name, "step") for name in names]
    steps = {float(_of_shape(state, key, torch.Size())) for key in keys if key in state}
    if len(steps) > 1:
        name = type(engine.optimizer.optimizer).__name__
        raise CheckpointError(
            f"the parameters are at different steps of {name}, {sorted(steps)}: DeepSpeed keeps one"
            " for all. Resume with the strategy that saved them, or with fsdp"
        )
    for step in steps:
        _set_steps(engine, step)
    moments = _moments(engine)
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        for moment in (None, *moments) if steps and parameter.requires_grad else (None,):
            if is_partial and _key(name, moment) not in state:
                continue
            whole = _of_shape(state, _key(name, moment), shape)
            set_fragment(engine, parameter, whole, moment)
    for name, buffer in _buffers(model):
        if not is_partial or _key(name) in state:
            buffer.copy_(_of_shape(state, _key(name), buffer.shape))


def take_groups(engine: Any, known: list[dict[str, Any]], rest: Mapping[str, Any]) -> None:
    """Take over a checkpoint's hyperparameters, of which the rate is the schedule's.

    engine: its groups of parameters are changed. known: the same with the parameters' names.
    """
    keys = spec_of(engine.optimizer.optimizer).zero_hyperparameters
    origin_of = {name: saved for saved in rest["optimizer_groups"] for name in saved["params"]}
    for group, own in zip(engine.optimizer.param_groups, known, strict=True):
        origin = origin_of[own["params"][0]]
        # How a step is computed is this process's affair.
        for key in keys:
            group[key] = origin[key]


def _of_shape(state: Mapping[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    value = state.get(key)
    if value is None:
        raise CheckpointError(f"the checkpoint lacks {key}")
    if value.shape != shape:
        raise CheckpointError(f"{key} has shape {list(value.shape)}, not {list(shape)}")
    return value


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the buffers that belong to the model's state, by the names that its state has."""
    known = {id(buffer) for buffer in model.buffers()}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in known:
            yield name, value


def _flats(engine: Any) -> list[Tensor]:
    """Return the flat fp32 tensors that this rank's optimizer steps."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _moments(engine: Any) -> tuple[str, ...]:
    """Return the names of the optimizer's state that has the shape of the parameters."""
    optimizer = engine.optimizer.optimizer
    moments = spec_of(optimizer).zero_state
    if moments is None:
        raise TypeError(f"ZeRO cannot run {type(optimizer).__name__}")
    return moments


def _steps(engine: Any) -> float:
    """Return how many steps the optimizer made, 0 before the first."""
    state = engine.optimizer.optimizer.state
    return max(float(state[flat]["step"]) if state.get(flat) else 0.0 for flat in _flats(engine))


def _set_steps(engine: Any, steps: float) -> None:
    """Set the count of steps, and make room for the moments before the first one."""
    optimizer, moments = engine.optimizer.optimizer, _moments(engine)
    for flat in _flats(engine):
        if not optimizer.state[flat]:
            device = flat.device if optimizer.defaults.get("fused") else "cpu"
            optimizer.state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for moment in moments:
                optimizer.state[flat][moment] = torch.zeros_like(flat)
        optimizer.state[flat]["step"].fill_(steps)


@torch.no_grad()
def publish(engine: Any) -> None:
    """Let the parameters that are computed with follow the fp32 weights; collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    for number in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    # Small parameters stay gathered between steps.
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
