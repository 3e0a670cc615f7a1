"""What operations do, from their names to the memory of what they give."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Seen(TorchDispatchMode):
    """Notes operations and their results.

    names: in their order. elements: of the largest result. dtypes: of the last result, by the name
    without namespace and overload. peak_bytes: the most of results that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.elements = self.peak_bytes = 0
        self.dtypes: dict[str, torch.dtype] = {}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
                self.dtypes[func.overloadpacket.__name__] = leaf.dtype
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return out

    def live_bytes(self) -> int:
        """Bytes of results that are still alive."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())
