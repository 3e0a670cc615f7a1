"""Less memory for activations: layers whose forward pass is done again during backward.

Applied to a model from outside, after it is made and before it is compiled or sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from modtrain.parallel.config import ACTIVATION_CHECKPOINTING

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "_grouped_mm"})
_CHOICES = frozenset({"topk", "sort"})


def apply(model: nn.Module, mode: str) -> None:
    """Wrap each of ``model.layers`` in place.

    A layer may draw random numbers, which come again as they were, but must not change its own
    state in training: it would do so twice. Names of parameters, buffers and modules, and the
    state dict, stay as they are.

    mode: what is kept from forward to backward. ``none``: all that gradients need. ``selective``:
        the results of matrix products, attention, collectives and modtrain's own operations; the
        cheap rest, such as norms and activations, is computed again (arXiv 2205.05198, section 5).
        It goes through backward once only, ``retain_graph`` or not. ``full``: each layer's input
        alone; a step costs about a third more.

    Raises:
        ValueError: ``mode`` is none of these.
    """
    if mode not in ACTIVATION_CHECKPOINTING:
        known = ", ".join(ACTIVATION_CHECKPOINTING)
        raise ValueError(f"activation checkpointing is one of {known}, not {mode}")
    if mode == "none":
        return
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _selective_policy)
    layers = model.get_submodule("layers")
    for name, layer in list(layers.named_children()):
        layers.register_module(name, _Checkpointed(layer, **options))


class _Checkpointed(CheckpointWrapper):
    """A wrapper that has the name of the layer inside.

    torch's own hides itself in state dicts only: in the names of the whole model's parameters it
    would show, and code that looks weights up by name would take one weight for two.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Give the wrapper itself, and the layer inside under the same name."""
        memo = set() if memo is None else memo
        if self in memo and remove_duplicate:
            return
        memo.add(self)
        yield prefix, self
        inner: nn.Module = self._checkpoint_wrapped_module
        yield from inner.named_modules(memo, prefix, remove_duplicate)


def _selective_policy(
    _context: SelectiveCheckpointContext, operation: Any, *_args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    namespace, _, name = operation.name().partition("::")
    name = name.partition(".")[0]
    # What ranks exchanged is not to travel twice.
    is_saved = namespace in ("modtrain", "_c10d_functional")
    if namespace == "aten":
        # Choices weigh little, and made anew they might fall out differently on some devices.
        is_saved = name in _PRODUCTS | _CHOICES or name.startswith("_scaled_dot_product_")
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
