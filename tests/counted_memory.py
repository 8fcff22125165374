"""Counts the memory of tensors without numbers: on the meta device, or torch's fake tensors."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedMemory(TorchDispatchMode):
    """Adds up the memory of all tensors made inside `with`, each until nobody holds it any more."""

    def __init__(self):
        super().__init__()
        self.now = 0  # bytes
        self.peak = 0
        self.sizes = {}  # of the storages that are alive

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage) -> None:
        key = storage._cdata  # one for all views of the same memory
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key) -> None:
        self.now -= self.sizes.pop(key)
