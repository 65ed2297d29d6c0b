"""Activation: the inputs of feed-forward layers, rounded to a few levels that are learned with the model.

    learned     x^ = s round(clip(x / s, low, high)), one step s per layer; codes are signed unless the data has no
                negative number. At one bit the codes are -1 and 1.
    binary      x^ = base + sum_n a_n [r_n >= t_n],  r_0 = x - base,  r_n+1 = r_n - a_n [r_n >= t_n]: one threshold and
                one step per bit
    piecewise   x^ = g^-1(round(g(x))), g rising and linear between `pieces` + 1 learned thresholds, onto the codes

Shapes   x [.. in]   ->   [.. out]
Cost     a pass over x beside the layer itself: rounding alone saves nothing. `learned` up to 8 bits followed by Int8()
         stores x as int8 and multiplies integers, with a step that needs no pass over the row.
Exact    x^ is off by at most half the distance of the levels around x, between the outer levels.
Source   learned: Esser et al., "Learned Step Size Quantization", sections 2.1 and 2.2, https://arxiv.org/abs/1902.08153;
         binary: Lin, Zhao and Pan, "Towards Accurate Binary Convolutional Neural Network", section 3.2,
         https://arxiv.org/abs/1711.11294; piecewise: Yamamoto, "Learnable Companding Quantization", section 3,
         https://arxiv.org/abs/2103.07156
Differs  gradients pass every rounding as if it were the identity between the outer levels, and are 0 for x beyond
         them; the first levels come from calibration data (least squared error) or from `limit`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._base import Block, Form, Size, is_linear, weight_of
from ._moments import Moments

KINDS = ("learned", "binary", "piecewise")
SEEN = 1 << 16  # sampled numbers from which the first levels are made
EXTREME = 1 << 10  # of them the largest


@dataclass(frozen=True, kw_only=True)
class Activation(Form):
    """Inputs of every feed-forward layer in `bits` (1 to 8), by levels of a `kind`.

    pieces   linear pieces of `piecewise`.
    limit    the first levels span -limit .. limit; None takes them from calibration data.
    """

    name: ClassVar[str] = "activation"
    order: ClassVar[int] = 2
    lossless: ClassVar[bool] = True

    kind: str = "learned"
    bits: int = 8
    pieces: int = 4
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, most in (("bits", 8), ("pieces", 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r}")
        if self.limit is not None and not (isinstance(self.limit, float | int) and 0 < self.limit < math.inf):
            raise ValueError(f"limit is the largest number the first levels reach, above 0, got {self.limit!r}")

    @property
    def calibrated(self) -> bool:
        return self.limit is None

    def apply(self, block: Block, size: Size | None = None, moments: dict[str, Moments] | None = None) -> Size:
        sizes: Size = {}
        layers = dict(block.linears())
        for path in block.paths:
            if not any(within == path or within.startswith(f"{path}.") for within in layers):
                weight_of(block.get(path), path)  # raises and names it
        for path, layer in layers.items():
            kind = weight_of(layer, path)
            x = weight = None
            if self.calibrated and not kind.is_meta:
                x, weight = spread(self._moments(path, moments).sample)
            signed = bool(size[path]) if size is not None else x is None or bool((x < 0).any())
            made: nn.Module
            if self.kind == "learned":
                made = Learned(self.bits, signed)
            elif self.kind == "binary":
                made = Binary(self.bits)
            else:
                made = Piecewise(self.bits, self.pieces)
            if not kind.is_meta:
                limit = self.limit or 1.0
                with torch.no_grad():
                    start: Any = made.start
                    start(torch.linspace(-limit, limit, SEEN) if x is None else x, weight)
            made.to(device=kind.device, dtype=kind.dtype)
            block.replace(path, ActivationQuantized(layer, made))
            sizes[path] = signed
        return sizes

    def restore(self, block: Block) -> None:
        for path in block.paths:
            for name, module in list(block.get(path).named_modules()):
                if isinstance(module, ActivationQuantized):
                    block.replace(f"{path}.{name}" if name else path, module.linear)


class ActivationQuantized(nn.Module):
    """x [.. in] -> linear(levels(x)) [.. out]."""

    def __init__(self, linear: nn.Module, levels: nn.Module) -> None:
        super().__init__()
        if not is_linear(linear):
            raise ValueError(f"expected a plain linear layer, got {type(linear).__name__}")
        self.levels, self.linear = levels, linear
        self.in_features, self.out_features = weight_of(linear).shape[::-1]
        self.integers = False  # does the layer multiply the codes themselves?

    @property
    def weight(self) -> Tensor:
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self.integers:
            return self.linear(self.levels(x), step_of(self.levels))
        return self.linear(self.levels(x))


class Learned(nn.Module):
    """One learned step between equally spaced levels."""

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.low: int = -(2 ** (bits - 1)) if signed else 0
        self.high: int = self.low + 2**bits - 1
        self.step = nn.Parameter(torch.ones(()))

    def start(self, x: Tensor, weight: Tensor | None = None) -> None:
        """The step of least squared error over x [n], among a hundred; `weight` [n] as of `spread`."""
        high = max(self.high, 1)
        widest = x.abs().amax().clamp(min=torch.finfo(torch.float32).tiny) / high
        steps = [widest * share / 50 for share in range(1, 101)]
        errors = torch.stack([_squares(self._round(x, step) - x, weight) for step in steps])
        self.step.copy_(steps[int(errors.argmin())])

    def codes(self, x: Tensor) -> Tensor:
        """The whole numbers that x is rounded to, in x's dtype."""
        return self._codes(x / self._positive(self.step).to(x))

    def forward(self, x: Tensor) -> Tensor:
        # Esser et al., section 2.2: the gradient of the step is scaled by 1 / sqrt(numbers x codes)
        share = 1 / math.sqrt(x.numel() * max(self.high, 1))
        step = self._positive(self.step)
        return self._round(x, (step * share + (step - step * share).detach()).to(x))

    @staticmethod
    def _positive(step: Tensor) -> Tensor:
        return step.abs().clamp(min=torch.finfo(step.dtype).tiny)

    def _codes(self, u: Tensor) -> Tensor:
        if self.bits == 1 and self.signed:  # two codes around zero instead of -1 and 0
            bounded = u.clamp(-1, 1)
            return bounded + (torch.where(u >= 0, 1.0, -1.0).to(u) - bounded).detach()
        bounded = u.clamp(self.low, self.high)
        return bounded + (bounded.round() - bounded).detach()

    def _round(self, x: Tensor, step: Tensor) -> Tensor:
        return self._codes(x / step) * step


class Binary(nn.Module):
    """One threshold and one step per bit, from the largest to the smallest."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.base = nn.Parameter(torch.zeros(()))
        self.steps = nn.Parameter(torch.ones(bits))
        self.thresholds = nn.Parameter(torch.ones(bits) / 2)

    def start(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Equal steps of least squared error over x [n]; at one bit the means on each side of a threshold."""
        if self.bits == 1:
            low, high = float(x.amin()), float(x.amax())
            w = torch.ones_like(x) if weight is None else weight
            for _ in range(20):  # Lloyd's iteration
                up = x >= (low + high) / 2
                low, high = (
                    float((x[part] * w[part]).sum() / w[part].sum()) if part.any() else end
                    for part, end in ((~up, low), (up, high))
                )
            self._span(low, high)
        else:
            start_best(self, x, weight, self._span)

    def _span(self, low: float, high: float) -> None:
        span = max(high - low, torch.finfo(torch.float32).tiny)
        steps = span / (2**self.bits - 1) * 2.0 ** torch.arange(self.bits - 1, -1, -1)
        self.base.fill_(low)
        self.steps.copy_(steps)
        self.thresholds.copy_(steps - steps[-1] / 2)

    def forward(self, x: Tensor) -> Tensor:
        rest, out = x - self.base.to(x), self.base.to(x).expand_as(x)
        for step, threshold in zip(self.steps.to(x).unbind(), self.thresholds.to(x).unbind(), strict=True):
            # a ramp of height 1 around the threshold, as wide as the step: the gradient of the jump
            ramp = ((rest - threshold) / step.abs().clamp(min=torch.finfo(x.dtype).tiny) + 0.5).clamp(0, 1)
            bit = ramp + ((rest >= threshold).to(x) - ramp).detach()
            out, rest = out + step * bit, rest - step * bit
        return out


class Piecewise(nn.Module):
    """2 ** bits levels, dense where the pieces are short."""

    def __init__(self, bits: int, pieces: int) -> None:
        super().__init__()
        self.bits, self.pieces = bits, pieces
        self.first = nn.Parameter(torch.zeros(()))
        self.widths = nn.Parameter(torch.zeros(pieces))  # logarithms: pieces never turn around

    def start(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Thresholds halfway between equal shares of x [n] and equal distances, the ends of least squared error."""

        def between(low: float, high: float) -> None:
            inside = x[(x >= low) & (x <= high)].float().cpu()
            shares = torch.quantile(inside, torch.linspace(0, 1, self.pieces + 1))
            thresholds = (shares + torch.linspace(low, high, self.pieces + 1)) / 2
            self.first.copy_(thresholds[0])
            self.widths.copy_(thresholds.diff().clamp(min=1e-6).log())

        start_best(self, x, weight, between)

    def forward(self, x: Tensor) -> Tensor:
        widths = self.widths.to(torch.promote_types(x.dtype, torch.float32)).exp()
        ends = self.first.to(widths) + torch.cat([widths.new_zeros(1), widths.cumsum(0)])
        wide = x.to(widths)
        # beyond the ends x stands on them, so that they learn and x has no gradient there
        wide = torch.where(wide < ends[0], ends[0], torch.where(wide > ends[-1], ends[-1], wide))
        n = (torch.bucketize(wide.detach(), ends.detach()[1:-1], right=True)).clamp(max=self.pieces - 1)
        u = (n + (wide - ends[n]) / widths[n]) * ((2**self.bits - 1) / self.pieces)
        u = u + (u.round() - u).detach()
        u = u * (self.pieces / (2**self.bits - 1))
        m = u.detach().floor().long().clamp(0, self.pieces - 1)
        return (ends[m] + (u - m) * widths[m]).to(x.dtype)


def start_best(levels: nn.Module, x: Tensor, weight: Tensor | None, start: Callable[[float, float], None]) -> None:
    """Start levels between the ends, among several quantiles of x [n], that round x with the least squared error."""
    found: list[tuple[float, float, float]] = []
    for share in (0.0, 0.0005, 0.002, 0.01, 0.03, 0.07, 0.15):
        low, high = (float(torch.quantile(x.float(), q)) for q in (share, 1 - share))
        if high > low or not share:
            start(low, high)
            found.append((float(_squares(levels(x).detach() - x, weight)), low, high))
    start(*min(found)[1:])


def _squares(off: Tensor, weight: Tensor | None) -> Tensor:
    return off.square().mean() if weight is None else (off.square() * weight).sum() / weight.sum()


def spread(sample: Tensor) -> tuple[Tensor, Tensor]:
    """At most SEEN numbers of a sample [n d] in fp32, and how many each stands for: the EXTREME largest one by one,
    for a handful of them can hold most of the energy; of the rest some that are drawn, since even steps over rows
    would meet the same few features only."""
    flat = sample.flatten()
    if len(flat) <= SEEN:
        return flat.float(), torch.ones_like(flat, dtype=torch.float32)
    extreme = flat.abs().topk(EXTREME).indices
    rest = torch.ones_like(flat, dtype=torch.bool)
    rest[extreme] = False
    others = flat[rest]
    draws = torch.Generator().manual_seed(0)
    drawn = others[torch.randint(len(others), (SEEN - EXTREME,), generator=draws).to(flat.device)]
    weight = torch.full_like(drawn, len(others) / len(drawn), dtype=torch.float32)
    return torch.cat([flat[extreme], drawn]).float(), torch.cat([torch.ones_like(weight[:EXTREME]), weight])


def step_of(levels: Any) -> Tensor | None:
    """The learned step where codes fit signed int8: what an int8 layer multiplies with. None for other levels."""
    if (
        isinstance(levels, Learned)
        and levels.low >= -128
        and levels.high <= 127
        and (levels.bits > 1 or not levels.signed)
    ):
        return levels._positive(levels.step)
    return None
