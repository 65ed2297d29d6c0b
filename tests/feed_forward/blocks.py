"""Small feed-forwards for the tests of forms: one dense block, one gated, one with its gate fused, one of Conv1D."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_tfast.feed_forward import Block, Moments
from hf_tfast.testing import generator

HIDDEN, INNER = 24, 40
KINDS = ("plain", "gated", "fused", "conv1d")


class FeedForward(nn.Module):
    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.kind = kind
        if kind == "conv1d":
            self.up, self.down = Conv1D(INNER, HIDDEN), Conv1D(HIDDEN, INNER)
        else:
            self.up = nn.Linear(HIDDEN, INNER * (2 if kind == "fused" else 1), bias=bias)
            self.down = nn.Linear(INNER, HIDDEN, bias=bias)
        if kind == "gated":
            self.gate = nn.Linear(HIDDEN, INNER, bias=bias)

    def inner(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.kind == "fused":
            gate, up = up.chunk(2, -1)
            return nn.functional.silu(gate) * up
        return nn.functional.silu(self.gate(x)) * up if self.kind == "gated" else nn.functional.gelu(up)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(x))


def block(kind: str, *seed: object, bias: bool = True, dtype: torch.dtype = torch.float64) -> Block:
    """A block with random weights and biases."""
    module, random = FeedForward(kind, bias).to(dtype), generator("block", kind, *seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) / 4)
    ups = ("gate", "up") if kind == "gated" else ("up",)
    return Block(model=module, stack="text", layer=0, ups=ups, down="down", parts=2 if kind == "fused" else 1)


def inputs(*seed: object, rows: int = 300, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """[rows hidden] with a mean and directions of different sizes; of `rank`, if given."""
    random = generator("inputs", *seed)
    sizes = torch.logspace(0.5, -1.5, HIDDEN, dtype=torch.float64)
    if rank is not None:
        sizes[rank:] = 0
    turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=random, dtype=torch.float64)).Q
    x = torch.randn(rows, HIDDEN, generator=random, dtype=torch.float64) * sizes @ turn
    mean = torch.randn(HIDDEN, generator=random, dtype=torch.float64) / 2
    return (x + (mean if rank is None else 0)).to(dtype)


def moments(given: Block, x: Tensor) -> dict[str, Moments]:
    """Of the inputs of the block's layers when it reads x."""
    found = {path: Moments() for path in given.paths}
    with torch.no_grad():
        for path in given.ups:
            found[path].add(x)
        found[given.down].add(given.model.inner(x))  # type: ignore[operator]
    return found


def outputs(given: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        return given.model(x)


def error(given: Block, dense: Block, x: Tensor) -> float:
    """Relative error of the block's outputs."""
    exact = outputs(dense, x)
    return float((outputs(given, x) - exact).norm() / exact.norm())
