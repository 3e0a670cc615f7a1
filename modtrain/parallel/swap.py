"""Let a module of a model that exists compute in another way."""

from __future__ import annotations

from typing import Any

from torch import nn

# Equal modules are of one class, or compiled layers would not share their code.
_COMBINED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swap_class(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Put ``kind``'s methods before those of the module's class; its parameters stay as they are.

    Where the module's class was swapped before, ``super()`` in ``kind`` is what it was swapped to:
    the last call stands outermost. Attributes need names that no other class of the module uses.
    """
    own = type(module)
    if not issubclass(kind, own):
        if (kind, own) not in _COMBINED:
            name, namespace = f"{kind.__name__}{own.__name__}", {"__module__": kind.__module__}
            _COMBINED[kind, own] = type(name, (kind, own), namespace)
        kind = _COMBINED[kind, own]
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)
