"""Which parameters are trained, from which step on and at which rate, by patterns of their names.

A pattern is a name as messages print it, without the modules that routing wraps around what it
routes: ``layers.3.mlp.up.weight``. ``*`` stands for any text, ``layers.0-3.*`` for those layers,
and ``routers`` for all that depth routing adds: routers, gates and predictors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from modtrain.common.errors import Problem
from modtrain.models.config import ModelConfig
from modtrain.optimizers.config import ROUTERS, OptimizerConfig

if TYPE_CHECKING:
    from torch import nn

_LAYERS = re.compile(r"layers\.(\d+)-(\d+)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# What other modules put into the names of those they wrap.
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
_SHOWN = 6


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` means the parameter ``name``, a canonical one; not for ``routers``."""
    span, layer = _LAYERS.fullmatch(pattern), _LAYER.fullmatch(name)
    if span is None or layer is None:
        return fnmatchcase(name, pattern)
    first, last = int(span[1]), int(span[2])
    return first <= int(layer[1]) <= last and fnmatchcase(layer[2], span[3])


def freeze(model: nn.Module, config: OptimizerConfig) -> None:
    """Freeze what ``config.train`` does not name: no gradient, no optimizer state.

    Before ``model``, a `Transformer`, is parallelized.
    """
    if config.train is None:
        return
    trained = _chosen(config.train, _meanings(model))
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)


def split_groups(
    groups: Iterable[Mapping[str, Any]], model: nn.Module, config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Divide an optimizer's groups by those of ``config``; empty ones are left out.

    A part has its group's rate times ``lr_scale``, and ``start_step`` where it is not 0.
    """
    if not config.groups:
        return [dict(group) for group in groups if group["params"]]
    meanings = _meanings(model)
    number_of: dict[str, int] = {}
    for number, own in enumerate(config.groups, 1):
        for name in _chosen(own.parameters, meanings):
            number_of.setdefault(name, number)
    numbers = {
        id(parameter): number_of.get(_bare(name), 0) for name, parameter in model.named_parameters()
    }
    parts = []
    for group in groups:
        for number in range(len(config.groups) + 1):
            params = [p for p in group["params"] if numbers[id(p)] == number]
            if params:
                parts.append(_part(group, params, number, config))
    return parts


def _part(
    group: Mapping[str, Any], params: Sequence[nn.Parameter], number: int, config: OptimizerConfig
) -> dict[str, Any]:
    if number == 0:
        return {**group, "params": params}
    own, rate = config.groups[number - 1], group.get("lr", config.lr)
    part = {
        **group,
        "params": params,
        "lr": rate * own.lr_scale,
        "rate_name": f"{group['rate_name']}_group_{number}",
    }
    return part | ({"start_step": own.start_step} if own.start_step else {})


def hold_gradients(groups: Iterable[Mapping[str, Any]], step: int) -> None:
    """Drop the gradients of parameters that are not trained in ``step``, counted from 0, yet.

    An optimizer passes over them: they keep their values, and have no state.
    """
    for group in groups:
        if step < group.get("start_step", 0):
            for parameter in group["params"]:
                parameter.grad = None


def pattern_problems(model: ModelConfig, config: OptimizerConfig, prefix: str) -> list[Problem]:
    """Find patterns that mean no parameter of ``model``, and what would train nothing at first.

    model: resolved, without problems.
    """
    if config.train is None and not config.groups:
        return []
    # Verbs that only plan import torch where a run has patterns alone.
    import torch

    from modtrain.models.transformer import Transformer

    with torch.device("meta"):
        built = Transformer(model)
    meanings = _meanings(built)
    problems = []
    lists = {f"{prefix}.train": config.train or []}
    lists |= {f"{prefix}.groups[{n}].parameters": g.parameters for n, g in enumerate(config.groups)}
    for key, patterns in lists.items():
        for pattern in patterns:
            if not _chosen([pattern], meanings):
                names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", m) for m in meanings.values()))
                shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
                reason = "is no parameter of the model"
                problems.append(Problem(key, pattern, reason, f"there are {shown}"))
    if problems:
        return problems
    freeze(built, config)
    later: set[str] = set()
    named: set[str] = set()
    for own in config.groups:
        fresh = _chosen(own.parameters, meanings) - named
        named |= fresh
        later |= fresh if own.start_step else set()
    if all(name in later or not p.requires_grad for name, p in built.named_parameters()):
        reason, remedy = "leave nothing to train in the first step", "let a group start at step 0"
        problems.append(Problem(f"{prefix}.groups", "start_step", reason, remedy))
    return problems


def num_trained(model: ModelConfig, config: OptimizerConfig) -> int | None:
    """Return how many parameters are trained of a model that is resolved; None: all."""
    if config.train is None:
        return None
    import torch

    from modtrain.models.transformer import Transformer

    with torch.device("meta"):
        built = Transformer(model)
    freeze(built, config)
    return sum(p.numel() for p in built.parameters() if p.requires_grad)


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _meanings(model: nn.Module) -> dict[str, str]:
    """Return the canonical name of each parameter, ``routers`` before it for what routing adds."""
    from modtrain.models.init import canonical_name
    from modtrain.models.transformer import routing_names

    routing = {_bare(name) for name in routing_names(model)}
    return {
        bare: (f"{ROUTERS} " if bare in routing else "") + canonical_name(bare)
        for bare in (_bare(name) for name, _ in model.named_parameters())
    }


def _chosen(patterns: Sequence[str], meanings: Mapping[str, str]) -> set[str]:
    """Return the names, of those in ``meanings``, that a pattern means."""
    chosen = set()
    for name, meaning in meanings.items():
        routing, _, canonical = meaning.rpartition(" ")
        if any(routing if p == ROUTERS else matches(p, canonical) for p in patterns):
            chosen.add(name)
    return chosen
