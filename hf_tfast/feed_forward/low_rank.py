"""LowRank: a linear layer becomes two, by way of `rank` features.

    W x + b ~ S (F x) + b,   F [rank in],  S [out rank]
    svd          S F = the best approximation of W of that rank: least squares over all x of equal length
    random       the same from a random sketch of W: faster to make, nearly as good
    activation   S F = the best approximation of the outputs W x over the calibration data: with C = E[x x^T],
                 W C^1/2 is cut to the rank and C^-1/2 undone. With a bias, C is centred and b takes up the mean error.
    recover      of svd and random: F stays, S = W C F^T (F C F^T)^-1 is the best for it over the calibration data

Shapes   x [.. in]   ->   [.. out]
Cost     rank (in + out) multiplications and parameters instead of in out: both less where rank < in out / (in + out)
Exact    at rank = min(in, out), up to rounding.
Source   Eckart and Young, https://doi.org/10.1007/BF02288367; random: Halko, Martinsson and Tropp, "Finding Structure
         with Randomness", algorithms 4.4 and 5.1, https://arxiv.org/abs/0909.4061; activation: Wang et al., "SVD-LLM",
         section 3.1, https://arxiv.org/abs/2403.07378
Differs  SVD-LLM whitens by a Cholesky factor; the symmetric root used here also works where features are dead.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ._base import Block, Form, Size, bias_of, check_finite, linear, same_kind, weight_of
from ._moments import Moments

METHODS = ("svd", "random", "activation")
OVERSAMPLING, POWERS = 16, 2  # of the random sketch


@dataclass(frozen=True, kw_only=True)
class LowRank(Form):
    """One of: `rank` itself; `ratio`, the share of the layer's weights that the factors hold; `energy`, the share of
    the squared singular values that must stay. `recover`: see above; `activation` has the best of both already."""

    name: ClassVar[str] = "low_rank"
    order: ClassVar[int] = 1

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    method: str = "svd"
    recover: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "ratio", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"LowRank takes one of rank, ratio and energy, got {' and '.join(given) or 'none'}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        for name in ("ratio", "energy"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, float | int) and 0 < value <= 1):
                raise ValueError(f"{name} is a share above 0 and up to 1, got {value!r}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.recover and self.method == "activation":
            raise ValueError("method='activation' is the least-squares answer for both factors: leave recover out")
        if self.energy is not None and self.method == "random":
            raise ValueError("energy needs all singular values, and method='random' finds only the first: give a rank")

    @property
    def calibrated(self) -> bool:
        return self.method == "activation" or self.recover

    @property
    def from_shapes(self) -> bool:
        return self.energy is None and not self.calibrated

    def apply(self, block: Block, size: Size | None = None, moments: dict[str, Moments] | None = None) -> Size:
        sizes: Size = {}
        for path in block.paths:
            layer = block.get(path)
            weight = weight_of(layer, path)
            rank = size[path] if size is not None else self._rank(weight, path)
            if weight.is_meta:
                if rank is None:
                    raise ValueError(f"{path}: the rank follows from the weights (energy), and there are none yet")
                first, second = weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
                bias = bias_of(layer)
            else:
                known = self._moments(path, moments) if self.calibrated else None
                check_finite(weight, path)
                first, second, bias = self._factors(weight.detach(), bias_of(layer), rank, known)
                if moments and path in moments:  # what a form after this one sees
                    moments[f"{path}.first"] = moments[path]
                    moments[f"{path}.second"] = moments[path].through(first)
            trained = next(layer.parameters()).requires_grad
            block.replace(path, LowRankLinear(first, second, bias, trained))
            sizes[path] = len(first)
        return sizes

    def _rank(self, weight: Tensor, path: str) -> int | None:
        """The rank as far as the shape decides it."""
        (o, i), rank = weight.shape, self.rank
        if self.ratio is not None:
            rank = max(1, int(self.ratio * o * i / (o + i)))
        if rank is not None and rank > min(o, i):
            raise ValueError(f"{path} is {i} -> {o}: rank {rank} is above its {min(o, i)}")
        return rank

    def _factors(
        self, weight: Tensor, bias: Tensor | None, rank: int | None, moments: Moments | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """F, S and the bias, in the weight's dtype; computed in at least fp32."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        undo, b = None, None if bias is None else bias.to(wide)
        seen = None if moments is None else (moments.second if bias is None else moments.covariance).to(wide.device)
        if seen is not None and self.method == "activation":
            root, undo = roots(seen)
            root, undo = root.to(wide.dtype), undo.to(wide.dtype)
            wide = wide @ root
        if self.method == "random" and rank is not None and rank < min(wide.shape):
            u, s, v = sketch(wide, rank, self.seed)
        else:
            u, s, vh = torch.linalg.svd(wide, full_matrices=False)
            v = vh.mT
        if rank is None:
            share = s.double().square().cumsum(0) / s.double().square().sum().clamp(min=torch.finfo(s.dtype).tiny)
            rank = min(int((share < self.energy - 1e-12).sum()) + 1, len(s))  # type: ignore[operator]
        scale = s[:rank].sqrt()
        first, second = (v[:, :rank] * scale).mT, u[:, :rank] * scale
        if undo is not None:
            first = first @ undo
        elif seen is not None:
            second = second_of(weight, first, seen)
        if moments is not None and b is not None:
            mean = moments.mean.to(first)
            b = b + weight.to(first) @ mean - second @ (first @ mean)
        kind = same_kind(weight)
        return first.to(**kind), second.to(**kind), None if b is None else b.to(**kind)


class LowRankLinear(nn.Module):
    """x [.. in] -> second(first(x)) [.. out]: two plain linear layers, so that LoRA, int8, tensor parallelism and
    sharding treat them as any other."""

    def __init__(self, first: Tensor, second: Tensor, bias: Tensor | None, trained: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = first.shape[1], second.shape[0]
        self.first = linear(first, None, trained)
        self.second = linear(second, bias, trained)

    def draw(self, std: float) -> None:
        """Initialise a new model: the product of the two has the standard deviation `std`."""
        each = (std / len(self.first.weight) ** 0.5) ** 0.5
        for half in (self.first, self.second):
            init.normal_(half.weight, std=each)

    @property
    def weight(self) -> Tensor:
        """One of the two, for code that asks a linear layer's weight for its dtype, its device or its loaded state."""
        return self.second.weight

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def roots(second: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and the pseudo-inverse C^-1/2 of a moment matrix [d d], in its dtype. Directions the data does not have
    stay zero in both: outputs there are not seen, and the least-squares answer is to leave them out."""
    values, vectors = torch.linalg.eigh((second + second.mT) / 2)
    noise = values[-1].clamp(min=0) * (len(values) * 1e-7)  # moments are sums of fp32 products
    lit = values > noise
    root = torch.where(lit, values, 0).sqrt()
    undo = torch.where(lit, values, torch.inf).rsqrt()
    return (vectors * root) @ vectors.mT, (vectors * undo) @ vectors.mT


def second_of(weight: Tensor, first: Tensor, seen: Tensor) -> Tensor:
    """S [out rank] of least squared error of S F x as W x, in F's dtype: W [out in], F [rank in], C [in in] fp64.
    Directions of F x that the data does not have stay zero, as in `roots`."""
    wide, f = weight.to(seen), first.to(seen)
    _, undo = roots(f @ seen @ f.mT)
    return (wide @ seen @ f.mT @ undo @ undo).to(first)


def sketch(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [out rank], S [rank], V [in rank] from a random range finder with power iterations; a function of the seed."""
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(rank + OVERSAMPLING, *weight.shape), niter=POWERS)
    return u[:, :rank], s[:rank], v[:, :rank]
