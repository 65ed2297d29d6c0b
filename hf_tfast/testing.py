"""What tests of mechanisms share: inputs, tolerances by dtype, an independent oracle, low-precision arithmetic.

Axes   b batch, h query heads, g key/value heads, i queries, j keys, d key width, e value width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .attention import Mask, Mechanism, Score

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference of two ways to compute one number, relative to 1 + the largest: a few hundred roundings."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one attention call; i None means as many queries as keys, e None a value width of d."""

    b: int = 2
    h: int = 4
    g: int = 2
    i: int | None = None
    j: int = 65
    d: int = 8
    e: int | None = None


def generator(*seed: Any) -> torch.Generator:
    """A CPU generator seeded by anything printable, so that every test draws its own inputs, the same on each run."""
    return torch.Generator().manual_seed(crc32(repr(seed).encode()))


def qkv(
    shape: Shape,
    *seed: Any,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    grad: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q [b h i d], k [b g j d], v [b g j e], leaves of the graph under `grad`.

    `transposed` gives the strides that models give: memory in [b i h d], seen as [b h i d].
    """
    random = generator(shape, *seed)
    i, e = shape.j if shape.i is None else shape.i, shape.d if shape.e is None else shape.e
    sizes = (shape.b, shape.h, i, shape.d), (shape.b, shape.g, shape.j, shape.d), (shape.b, shape.g, shape.j, e)
    q, k, v = (torch.randn(size, generator=random, dtype=torch.float64).to(device, dtype) for size in sizes)
    if transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, score: Score, at: Tensor | None = None
) -> Tensor:
    """Softmax attention over the pairs where `allowed` [.. i j] is true, written to share nothing with the library.

    Keys are repeated, everything runs in the dtype of the inputs, a query that reads nothing gives zeros. `at` [j] are
    the positions of the keys, for dropout. -> [b h i e]
    """
    (b, h, i, d), j = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * (d**-0.5 if score.scale is None else score.scale)
    if score.softcap is not None:
        scores = torch.tanh(scores / score.softcap) * score.softcap
    allowed = allowed.expand(b, h, i, j)
    nothing = ~allowed.any(-1, keepdim=True)
    scores = torch.where(allowed, scores, float("-inf")).masked_fill(nothing, 0.0)
    if score.sinks is not None:
        scores = torch.cat([scores, score.sinks.to(q.dtype).view(1, h, 1, 1).expand(b, h, i, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :j].masked_fill(nothing, 0.0)
    if score.dropout:
        at = torch.arange(j, device=q.device) if at is None else at
        rows, heads = torch.arange(b, device=q.device), torch.arange(h, device=q.device)
        kept = score.keep(rows[:, None, None, None], heads[:, None, None], at[j - i :, None], at)
        weights = weights * kept / (1.0 - score.dropout)
    return torch.einsum("b h i j, b h j e -> b h i e", weights, v)


def with_gradients(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, score: Score, *seed: Any
) -> dict[str, Tensor]:
    """Output of run(q, k, v, score) and the gradients of q, k, v and score.sinks for one random gradient of it."""
    leaves = {"q": q, "k": k, "v": v} | ({} if score.sinks is None else {"sinks": score.sinks})
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    if "sinks" in leaves:
        score = replace(score, sinks=leaves["sinks"])
    o = run(leaves["q"], leaves["k"], leaves["v"], score)
    upstream = torch.randn(o.shape, generator=generator("upstream", *seed), dtype=torch.float64).to(o)
    gradients = torch.autograd.grad(o, list(leaves.values()), upstream, allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            raise AssertionError(f"the output does not depend on {name}: its gradient is cut, or it is ignored")
    return {"o": o.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_near(actual: Tensor, expected: Tensor, what: str, tolerance: float | None = None) -> None:
    """Fail unless the largest difference is within the dtype's tolerance; names how far off it is and where."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: expected {tuple(expected.shape)} {expected.dtype}, got {tuple(actual.shape)} {actual.dtype}"
        )
    if not expected.numel():
        return
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    off = (actual.double() - expected.double()).abs()
    bound = tolerance * (1.0 + expected.abs().max().item())
    if not off.max().item() <= bound:  # also false for NaN
        worst = torch.unravel_index(off.nan_to_num(nan=torch.inf).argmax(), off.shape)
        at = tuple(int(n) for n in worst)
        raise AssertionError(
            f"{what}: off by {off.max().item():.3g} (allowed {bound:.3g}) at {at}: "
            f"{actual[at].item():.9g} instead of {expected[at].item():.9g}"
        )


class Rounded(TorchDispatchMode):
    """While active, every float32 result is rounded to `dtype`: what plain torch gives in that dtype, for code that
    widens to float32. Backward passes too. Results in float64 (tables, draws) stay as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.low = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.low == torch.float32 or func.is_view:
            return result
        outputs = result if isinstance(result, tuple | list) else (result,)
        rounded = [self._round(x, func) for x in outputs]
        return type(result)(rounded) if isinstance(result, tuple | list) else rounded[0]

    def _round(self, x: Any, func: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if any(r.alias_info is not None for r in func._schema.returns):  # in place: round what was written
            return x.copy_(x.to(self.low))
        return x.to(self.low).to(torch.float32)


def cast(choice: Any, dtype: torch.dtype) -> Any:
    """`choice` with its floating tensors in `dtype`: tuples, lists, dicts and dataclasses are walked."""
    if isinstance(choice, Tensor):
        return choice.to(dtype) if choice.is_floating_point() else choice
    if isinstance(choice, tuple) and hasattr(choice, "_fields"):
        return type(choice)(*(cast(x, dtype) for x in choice))
    if isinstance(choice, tuple | list):
        return type(choice)(cast(x, dtype) for x in choice)
    if isinstance(choice, dict):
        return {name: cast(x, dtype) for name, x in choice.items()}
    if is_dataclass(choice) and not isinstance(choice, type):
        return replace(choice, **{f.name: cast(getattr(choice, f.name), dtype) for f in fields(choice)})
    return choice


def naive_same_dtype(
    mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None
) -> dict[str, Tensor]:
    """Output and gradients of the reference computed entirely in the dtype of q: the error that plain torch makes."""
    with Rounded(q.dtype):
        return with_gradients(lambda q, k, v, s: mechanism.reference(q, k, v, mask, s, choice), q, k, v, score)
