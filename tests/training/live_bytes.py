"""Bytes of tensors that live at the same time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that are made within the body, as long as each of them lives.

    Attributes:
        peak: most bytes at a time.
    """

    def __init__(self):
        super().__init__()
        self.peak = self.live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        output = func(*args, **kwargs or {})
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, torch.Tensor):
                self._enter(value.untyped_storage(), before)
        return output

    def _enter(self, storage, before):
        key, size = storage.data_ptr(), storage.nbytes()
        if key in before or key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key, size):
        self._known.discard(key)
        self.live -= size
