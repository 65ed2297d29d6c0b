"""Pruned: neurons of the inner layer are taken out, so that the matrices really shrink.

    down(act(up(x)))[kept]:   rows `kept` of every layer up, columns `kept` of the layer down
    magnitude    keeps the neurons with the largest product of the norms of their rows and their column
    activation   keeps those with the largest E[h_n^2] |down_n|^2 over the calibration data, the most of the output
    random       keeps a seeded choice, the baseline of the other two
    recover      down becomes W C[:, kept] C[kept, kept]^-1, C = E[h h^T]: least squares over the same data, by which
                 the neurons that stay take over for those that go; a bias takes up the mean error

Shapes   x [.. hidden]   ->   [.. hidden]; inner -> width
Cost     width / inner of the time and of the bytes
Exact    at width = inner.
Source   Wanda's score summed over a column: Sun et al., "A Simple and Effective Pruning Approach for Large Language
         Models", section 3, https://arxiv.org/abs/2306.11695; recovery: Frantar and Alistarh, "Optimal Brain
         Compression", section 3, https://arxiv.org/abs/2208.11580
Differs  whole neurons instead of single weights, which no matrix multiplication of today can skip.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Block, Form, Size, bias_of, check_finite, linear, weight_of
from ._moments import Moments

METHODS = ("magnitude", "activation", "random")


@dataclass(frozen=True, kw_only=True)
class Pruned(Form):
    """One of: `width`, the neurons that stay; `ratio`, the share that stays. Widths are rounded to `multiple`."""

    name: ClassVar[str] = "pruned"
    order: ClassVar[int] = 0

    width: int | None = None
    ratio: float | None = None
    method: str = "magnitude"
    recover: bool = False
    multiple: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.width is None) == (self.ratio is None):
            raise ValueError(f"Pruned takes one of width and ratio, got {self.width!r} and {self.ratio!r}")
        for name in ("width", "multiple"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.ratio is not None and not (isinstance(self.ratio, float | int) and 0 < self.ratio <= 1):
            raise ValueError(f"ratio is the share of neurons that stay, above 0 and up to 1, got {self.ratio!r}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")

    @property
    def calibrated(self) -> bool:
        return self.method == "activation" or self.recover

    def reads(self, block: Block) -> tuple[str, ...]:
        return (block.down,) if self.calibrated else ()

    def apply(self, block: Block, size: Size | None = None, moments: dict[str, Moments] | None = None) -> Size:
        layers = {path: block.get(path) for path in block.paths}
        weights = {path: weight_of(layer, path) for path, layer in layers.items()}
        for path, weight in weights.items():
            check_finite(weight, path)
        down = weights[block.down]
        inner = down.shape[1]
        for path in block.ups:
            if weights[path].shape[0] != inner * block.parts:
                raise ValueError(
                    f"{path} gives {weights[path].shape[0]} features where {block.down} takes {inner}: not a plain "
                    "feed-forward, so that neurons cannot be taken out of it"
                )
        width = size[block.down] if size is not None else self._width(inner, block.down)
        bias = bias_of(layers[block.down])
        if down.is_meta:
            kept = torch.arange(width, device="meta")
            narrow = down.new_empty(down.shape[0], width)
        else:
            seen = self._moments(block.down, moments) if self.calibrated else None
            kept = self._choose(
                [weights[path].detach() for path in block.ups], down.detach(), width, block.parts, seen
            )
            narrow, bias = self._down(down.detach(), bias, kept, seen)
            if moments and block.down in moments:
                moments[block.down] = moments[block.down].part(kept)  # what a form after this one sees
        for path in block.ups:
            rows = torch.cat([kept + n * inner for n in range(block.parts)])
            up_bias = bias_of(layers[path])
            self._put(block, path, weights[path].detach()[rows], None if up_bias is None else up_bias[rows])
        self._put(block, block.down, narrow, bias)
        return {block.down: width}

    def _width(self, inner: int, path: str) -> int:
        if self.width is not None and self.width > inner:
            raise ValueError(f"{path} reads {inner} neurons: width {self.width} is above that")
        wanted = self.width if self.width is not None else self.ratio * inner  # type: ignore[operator]
        return min(inner, max(1, round(wanted / self.multiple)) * self.multiple)

    def _choose(self, ups: list[Tensor], down: Tensor, width: int, parts: int, seen: Moments | None) -> Tensor:
        """[width] int64, ascending: the neurons that stay."""
        if self.method == "random":
            draws = torch.Generator().manual_seed(self.seed)
            return torch.randperm(down.shape[1], generator=draws)[:width].sort().values.to(down.device)
        column = down.float().square().sum(0)
        if self.method == "activation":
            if seen is None:
                raise ValueError("method='activation' needs the moments of the calibration data")
            worth = column * seen.second.diagonal().to(column)
        else:
            worth = column
            for up in ups:
                for part in up.chunk(parts):
                    worth = worth * part.float().square().sum(1)
        return worth.topk(width).indices.sort().values

    def _down(
        self, down: Tensor, bias: Tensor | None, kept: Tensor, seen: Moments | None
    ) -> tuple[Tensor, Tensor | None]:
        """The narrower layer down and its bias."""
        if not self.recover or seen is None or len(kept) == down.shape[1]:
            return down[:, kept], bias
        c = (seen.second if bias is None else seen.covariance).to(down.device)
        own = c[kept][:, kept]
        # a share of the mean variance on the diagonal: neurons that never fire must not make it singular
        ridge = own.diagonal().mean().clamp(min=torch.finfo(own.dtype).tiny) * 1e-6
        own = own + ridge * torch.eye(len(kept), dtype=own.dtype, device=own.device)
        wide = down.double()
        narrow = torch.linalg.solve(own, (wide @ c[:, kept]).mT).mT
        if bias is not None:
            mean = seen.mean.to(wide)
            bias = (bias.double() + wide @ mean - narrow @ mean[kept]).to(bias.dtype)
        return narrow.to(down.dtype), bias

    @staticmethod
    def _put(block: Block, path: str, weight: Tensor, bias: Tensor | None) -> None:
        trained = next(block.get(path).parameters()).requires_grad
        layer: nn.Linear = linear(weight.clone() if not weight.is_meta else weight, bias, trained)
        block.replace(path, layer)
