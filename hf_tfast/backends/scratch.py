"""Memory that the steps of one pass share: the page faults of a fresh tensor cost a CPU more than a matmul on it."""

import math

import torch
from torch import Tensor


class Scratch:
    """Uninitialised, contiguous tensors by name: the next call under a name reuses its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        held = self.held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self.held[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)
