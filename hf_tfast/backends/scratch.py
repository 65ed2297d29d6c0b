"""Memory that the steps of one pass share: the page faults of a fresh tensor cost a CPU more than a matmul on it."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

KEPT = 2**22  # bytes of a tensor that outlives its pass, at most: those of tiles, never those of whole inputs


class Scratch:
    """Uninitialised, contiguous tensors by name: the next call under a name reuses its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        held = self.held.get((name, dtype))
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # what is made under inference mode cannot be written to outside of it
                held = self.held[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)


class _Idle(threading.local):
    """Scratch that no pass of this thread is using."""

    def __init__(self) -> None:
        self.scratch: list[Scratch] = []


_idle = _Idle()


@contextmanager
def borrowed(like: Tensor) -> Iterator[Scratch]:
    """Scratch for one pass over tensors like this one: nothing in it has a meaning before or after.

    On CPUs its smaller tensors are lent again to later passes of the same thread, to one at a time. While a program is
    traced, tensors stand for others, and none is kept.
    """
    if like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        yield Scratch(like.device)
        return
    scratch = _idle.scratch.pop() if _idle.scratch else Scratch(like.device)
    yield scratch
    scratch.held = {name: x for name, x in scratch.held.items() if x.nbytes <= KEPT}
    _idle.scratch.append(scratch)
