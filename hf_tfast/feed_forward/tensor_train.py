"""TensorTrain: the weight of a linear layer as a chain of small cores. It saves bytes, not time.

    W[o1 .. on, i1 .. in] ~ sum over r1 .. r(n-1) of  G1[1 i1 o1 r1] G2[r1 i2 o2 r2] .. Gn[r(n-1) in on 1]
    y = W x + b, contracted from the first core, from the last, or by way of W: whichever multiplies least for this x

Shapes   x [.. in]   ->   [.. out], in = i1 .. in, out = o1 .. on
Cost     sum of r i o r' parameters. Time: for many rows usually more than the dense layer's, which is what a rank that
         keeps the model's quality asks for; a size knob, not a speed knob.
Exact    at full ranks, up to rounding.
Source   Oseledets, "Tensor-Train Decomposition", algorithm 1, https://doi.org/10.1137/090752286; of layers: Novikov et
         al., "Tensorizing Neural Networks", section 4, https://arxiv.org/abs/1509.06569
Differs  the order of contraction is chosen for each number of rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ._base import Block, Form, Size, bias_of, check_finite, weight_of
from ._moments import Moments


@dataclass(frozen=True, kw_only=True)
class TensorTrain(Form):
    """One of: `ranks`, the largest of each cut (one number for all cuts); `ratio`, the share of the weights that the
    cores hold. `shape`: (factors of the hidden width, factors of the inner width), equally many; None finds three."""

    name: ClassVar[str] = "tensor_train"
    order: ClassVar[int] = 1

    ranks: int | tuple[int, ...] | None = None
    ratio: float | None = None
    shape: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        if (self.ranks is None) == (self.ratio is None):
            raise ValueError(f"TensorTrain takes one of ranks and ratio, got {self.ranks!r} and {self.ratio!r}")
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(tuple(side) for side in self.shape))
            if len(self.shape) != 2 or len(self.shape[0]) != len(self.shape[1]) or len(self.shape[0]) < 2:
                raise ValueError(
                    "shape is (factors of the hidden width, factors of the inner width), two or more each and equally "
                    f"many, got {self.shape!r}"
                )
        ranks = self.ranks if isinstance(self.ranks, tuple) else () if self.ranks is None else (self.ranks,)
        if any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
            raise ValueError(f"ranks are whole numbers of at least 1, got {self.ranks!r}")
        if self.shape is not None and isinstance(self.ranks, tuple) and len(self.ranks) != len(self.shape[0]) - 1:
            raise ValueError(f"{len(self.shape[0])} factors have {len(self.shape[0]) - 1} ranks, got {self.ranks!r}")
        if self.ratio is not None and not (isinstance(self.ratio, float | int) and 0 < self.ratio <= 1):
            raise ValueError(f"ratio is a share above 0 and up to 1, got {self.ratio!r}")

    def apply(self, block: Block, size: Size | None = None, moments: dict[str, Moments] | None = None) -> Size:
        sizes: Size = {}
        for path in block.paths:
            layer = block.get(path)
            weight = weight_of(layer, path).detach()
            ins, outs = self._factors(weight, path, down=path == block.down)
            ranks = tuple(size[path]) if size is not None else self._ranks(ins, outs, path)
            if weight.is_meta:
                ends = (1, *ranks, 1)
                cores = [weight.new_empty(ends[n], ins[n], outs[n], ends[n + 1]) for n in range(len(ins))]
            else:
                check_finite(weight, path)
                cores = [core.to(weight.dtype) for core in tensor_train(weight, ins, outs, ranks)]
            trained = next(layer.parameters()).requires_grad
            block.replace(path, TensorTrainLinear(cores, bias_of(layer), trained))
            sizes[path] = [core.shape[3] for core in cores[:-1]]
        return sizes

    def _factors(self, weight: Tensor, path: str, down: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Factors of the layer's inputs and outputs."""
        o, i = weight.shape
        if self.shape is None:
            count = len(self.ranks) + 1 if isinstance(self.ranks, tuple) else 3
            return balanced(i, count, path), balanced(o, count, path)
        ins, outs = self.shape[::-1] if down else self.shape
        if math.prod(ins) != i or math.prod(outs) != o:
            raise ValueError(
                f"{path} is {i} -> {o}, but the shape {self.shape!r} multiplies to {math.prod(ins)} -> "
                f"{math.prod(outs)}"
            )
        return ins, outs

    def _ranks(self, ins: tuple[int, ...], outs: tuple[int, ...], path: str) -> tuple[int, ...]:
        """The largest rank of each cut; none is above what the cut can have."""
        full = full_ranks(ins, outs)
        if isinstance(self.ranks, tuple):
            if any(r > most for r, most in zip(self.ranks, full, strict=True)):
                raise ValueError(f"{path}: ranks {self.ranks!r} are above the {full!r} that its factors can have")
            return self.ranks
        if self.ranks is not None:
            if self.ranks > max(full):
                raise ValueError(f"{path}: rank {self.ranks} is above the {max(full)} that its factors can have")
            return tuple(min(self.ranks, most) for most in full)
        budget = self.ratio * math.prod(ins) * math.prod(outs)  # type: ignore[operator]
        fitting = [r for r in range(1, max(full) + 1) if parameters(ins, outs, r) <= budget]
        if not fitting:
            raise ValueError(
                f"{path}: ratio {self.ratio} is less than rank 1 takes, {parameters(ins, outs, 1)} weights"
            )
        return tuple(min(fitting[-1], most) for most in full)


class TensorTrainLinear(nn.Module):
    """x [.. in] -> [.. out] by cores [r i o r'] as plain parameters."""

    def __init__(self, cores: Sequence[Tensor], bias: Tensor | None, trained: bool = True) -> None:
        super().__init__()
        self.cores = nn.ParameterList([nn.Parameter(core.contiguous(), requires_grad=trained) for core in cores])
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=trained)
        self.ins, self.outs = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
        self.in_features, self.out_features = math.prod(self.ins), math.prod(self.outs)

    def draw(self, std: float) -> None:
        """Initialise a new model: the weight that the cores stand for has the standard deviation `std`."""
        paths = math.prod(core.shape[3] for core in self.cores)  # products that each weight is the sum of
        for core in self.cores:
            init.normal_(core, std=(std / paths**0.5) ** (1 / len(self.cores)))
        if self.bias is not None:
            init.constant_(self.bias, 0.0)

    @property
    def weight(self) -> Tensor:
        """One of the cores, for code that asks a linear layer's weight for its dtype, device or loaded state."""
        return self.cores[0]

    def dense(self) -> Tensor:
        """[out in]: the weight that the cores stand for."""
        whole = self.cores[0][0]  # [i o r]
        for core in list(self.cores)[1:]:
            whole = torch.einsum("ior,rpqs->ipoqs", whole, core).flatten(0, 1).flatten(1, 2)
        return whole[..., 0].mT

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        way = cheapest(rows, [tuple(core.shape) for core in self.cores])
        if way == "dense":
            return nn.functional.linear(x, self.dense(), self.bias)
        y = self._forward(x, list(self.cores)) if way == "first" else self._backward(x, list(self.cores))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _forward(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        """From the first core: the state is [rows, outputs so far, r, inputs left]."""
        state = x.reshape(-1, 1, 1, self.in_features)
        for core in cores:
            state = state.unflatten(3, (core.shape[1], -1))
            state = torch.einsum("norik,riqs->noqsk", state, core).flatten(1, 2)
        return state

    def _backward(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        """From the last core: the state is [rows, inputs left, r, outputs so far]."""
        state = x.reshape(-1, self.in_features, 1, 1)
        for core in reversed(cores):
            state = state.unflatten(1, (-1, core.shape[1]))
            state = torch.einsum("nkiso,riqs->nkrqo", state, core).flatten(3, 4)
        return state


def tensor_train(weight: Tensor, ins: tuple[int, ...], outs: tuple[int, ...], ranks: tuple[int, ...]) -> list[Tensor]:
    """Cores [r i o r'] of weight [out in] by successive SVDs, in at least fp32."""
    n = len(ins)
    rest = weight.to(torch.promote_types(weight.dtype, torch.float32)).reshape(*outs, *ins)
    rest = rest.permute([axis for m in range(n) for axis in (n + m, m)])  # [i1 o1 i2 o2 ..]
    cores, left = [], 1
    for m in range(n - 1):
        rest = rest.reshape(left * ins[m] * outs[m], -1)
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        rank = min(ranks[m], len(s))
        cores.append(u[:, :rank].reshape(left, ins[m], outs[m], rank))
        rest, left = s[:rank, None] * vh[:rank], rank
    cores.append(rest.reshape(left, ins[-1], outs[-1], 1))
    return cores


def full_ranks(ins: tuple[int, ...], outs: tuple[int, ...]) -> tuple[int, ...]:
    """The rank that every cut of the chain can have at most."""
    sizes = [i * o for i, o in zip(ins, outs, strict=True)]
    return tuple(min(math.prod(sizes[:m]), math.prod(sizes[m:])) for m in range(1, len(sizes)))


def parameters(ins: tuple[int, ...], outs: tuple[int, ...], rank: int) -> int:
    """Weights in the cores when no cut has more than `rank`."""
    ends = (1, *(min(rank, most) for most in full_ranks(ins, outs)), 1)
    return sum(ends[m] * ins[m] * outs[m] * ends[m + 1] for m in range(len(ins)))


def balanced(width: int, count: int, path: str) -> tuple[int, ...]:
    """`count` factors of width, as equal as its primes allow, in descending order."""
    primes, rest, p = [], width, 2
    while p * p <= rest:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    primes += [rest] if rest > 1 else []
    if len(primes) < count:
        raise ValueError(
            f"{path}: {width} has no {count} factors above 1; give shape=((...), (...)) with fewer, or use LowRank"
        )
    factors = [1] * count
    for prime in reversed(primes):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted(factors, reverse=True))


def cheapest(rows: int, cores: Sequence[tuple[int, ...]]) -> str:
    """Which contraction multiplies least for so many rows: "first", "last" or "dense"."""
    total_in, total_out = math.prod(c[1] for c in cores), math.prod(c[2] for c in cores)
    forward, left, done = 0, total_in, 1
    for r, i, o, s in cores:
        forward, left, done = forward + done * r * left * o * s, left // i, done * o
    backward, left, done = 0, total_in, 1
    for r, i, o, s in reversed(cores):
        backward, left, done = backward + done * s * left * o * r, left // i, done * o
    build, i_done, o_done = 0, cores[0][1], cores[0][2]
    for r, i, o, s in cores[1:]:
        build, i_done, o_done = build + i_done * o_done * r * i * o * s, i_done * i, o_done * o
    costs = {"first": rows * forward, "last": rows * backward, "dense": build + rows * total_in * total_out}
    return min(costs, key=lambda way: costs[way])
