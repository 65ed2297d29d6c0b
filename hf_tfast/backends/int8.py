"""Products of rows with an int8 weight: quantise the rows, multiply integers, scale back, each step in one pass.

On a CPU the integer product is `torch._int_mm`, which runs on AVX-512's VNNI; the steps around it are compiled where a
C++ compiler exists. On CUDA `torch._int_mm` is cuBLASLt's.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

logger = logging.getLogger(__name__)

ROWS = 512
LEAST_ROWS = 17  # cuBLASLt multiplies no fewer


class Int8Product(NamedTuple):
    """codes [out in] int8, scale [out] fp32: the weight is codes * scale / 127; bias [out] or None. Columns of x with
    a number of at least `threshold` (0: none) are not rounded."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    threshold: float

    @staticmethod
    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        """codes and scale of weight [out in]; a row of zeros has scale 0. On meta only the shapes are made."""
        wide = weight.float()
        scale = wide.abs().amax(1)
        codes = (wide * (127 / scale.clamp(min=torch.finfo(torch.float32).tiny))[:, None]).round().to(torch.int8)
        return codes, scale


def int8_linear(x: Tensor, product: Int8Product, step: Tensor | None = None) -> Tensor:
    """x [.. in] -> [.. out] in x's dtype.

    step   scalar, or None: x holds whole multiples of it that fit int8, so that nothing is rounded here.
    """
    if x.shape[-1] != product.codes.shape[1]:
        raise ValueError(f"expected inputs [.. {product.codes.shape[1]}], got {list(x.shape)}")
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or (step is not None and step.requires_grad)):
        y = _Straight.apply(flat, product.codes, product.scale, product.bias, product.threshold, step)
    else:
        y = _product(flat, product, step)
    return y.view(*x.shape[:-1], len(product.codes))


class _Straight(torch.autograd.Function):
    """The integer product; its gradient is that of the stored weight, as if x had not been rounded."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        threshold: float,
        step: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.has_bias = bias is not None
        return _product(x, Int8Product(codes, scale, bias, threshold), step)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        codes, scale = ctx.saved_tensors
        (grad,) = grads
        weight = codes.to(grad.dtype) * (scale / 127).to(grad.dtype)[:, None]
        bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
        return grad @ weight, None, None, bias, None, None


def _product(x: Tensor, product: Int8Product, step: Tensor | None) -> Tensor:
    way = way_of(x.device.type)
    if way == "bf16":
        return _in_bf16(x, product)
    steps = _steps(way == "compiled")
    return _by_rows(x, len(product.codes), lambda rows: _rows_product(rows, product, steps, step))


def _by_rows(x: Tensor, out: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """[n out]: a few hundred rows at a time on a CPU, so that what lies between two steps stays in its cache."""
    if x.is_cuda or len(x) <= ROWS:
        return run(x)
    y = x.new_empty(len(x), out)
    for first in range(0, len(x), ROWS):
        y[first : first + ROWS] = run(x[first : first + ROWS])
    return y


def _rows_product(x: Tensor, product: Int8Product, steps: "_Steps", step: Tensor | None = None) -> Tensor:
    if step is None:
        codes, scale = steps.quantise(x)
        if _has_outliers(scale, product):
            return _with_outliers(x, product, steps)
    else:
        codes, scale = steps.cast(x, step.detach().to(x)), (step.detach().float() * 127).expand(len(x), 1)
    return steps.scale_back(_multiply(codes, product.codes), scale, product.scale, product.bias, x)


def _has_outliers(scale: Tensor, product: Int8Product) -> bool:
    return bool(product.threshold) and bool((scale >= product.threshold).any())


def int8_feed_forward(
    x: Tensor, ups: Sequence[Int8Product], down: Int8Product, activation: str, parts: int = 1
) -> Tensor:
    """x [.. hidden] -> [.. hidden] in x's dtype, in one go and without gradient: down(act(up(x))), or with a gate, two
    `ups` or one of two `parts`, down(act(gate(x)) * up(x)).

    activation   one of ACTIVATIONS.
    """
    flat = x.reshape(-1, x.shape[-1])
    way = way_of(x.device.type)
    if way == "bf16":
        y = _in_bf16(_activated([_in_bf16(flat, up) for up in ups], activation, parts), down)
    else:
        steps = _steps(way == "compiled")
        y = _by_rows(
            flat, len(down.codes), lambda rows: _rows_feed_forward(rows, ups, down, (activation, parts), steps)
        )
    return y.view(*x.shape[:-1], len(down.codes))


def _rows_feed_forward(
    x: Tensor, ups: Sequence[Int8Product], down: Int8Product, act: tuple[str, int], steps: "_Steps"
) -> Tensor:
    codes, scale = steps.quantise(x)
    if _has_outliers(scale, ups[0]):
        h = _activated([_with_outliers(x, up, steps) for up in ups], *act)
    else:
        sums = [_multiply(codes, up.codes) for up in ups]
        h = _middle(steps.compiled, *act)(sums, scale, [up.scale for up in ups], [up.bias for up in ups])
    return _rows_product(h, down, steps).to(x.dtype)


@cache
def _middle(compiled: bool, activation: str, parts: int) -> Callable[..., Tensor]:
    """Integer sums of the layers up -> the inner activations, fp32."""

    def middle(sums: list[Tensor], scale: Tensor, scales: list[Tensor], biases: list[Tensor | None]) -> Tensor:
        ys = [s.float() * (scale * (1 / 127**2)) * w for s, w in zip(sums, scales, strict=True)]
        ys = [y if bias is None else y + bias.float() for y, bias in zip(ys, biases, strict=True)]
        return _activated(ys, activation, parts)

    return torch.compile(middle, dynamic=True) if compiled else middle


def _activated(ys: list[Tensor], activation: str, parts: int) -> Tensor:
    if parts > 1:
        ys = list(ys[0].chunk(parts, -1))
    act = ACTIVATIONS[activation]
    return act(ys[0]) if len(ys) == 1 else act(ys[0]) * ys[1]


def _erf(x: Tensor) -> Tensor:
    """Within 3e-7, from products and one division: Abramowitz and Stegun, "Handbook", 7.1.28. A third faster in
    compiled code than the library's."""
    z = x.abs()
    series = 0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638
    p = torch.zeros_like(z)
    for factor in reversed(series):
        p = (p + factor) * z
    p = p + 1
    for _ in range(4):
        p = p * p
    y = 1 - 1 / p
    return torch.where(x < 0, -y, y)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda y: 0.5 * y * (1 + _erf(y * 0.5**0.5)),
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "relu": F.relu,
    "silu": F.silu,
}


def _with_outliers(x: Tensor, product: Int8Product, steps: "_Steps") -> Tensor:
    """Columns that hold a large number are multiplied as they are; the others are rounded without them."""
    large = (x.abs() >= product.threshold).any(0)
    at = large.nonzero()[:, 0]
    codes, scale = steps.quantise(x.masked_fill(large, 0))
    y = steps.scale_back(_multiply(codes, product.codes), scale, product.scale, product.bias, x)
    weight = product.codes[:, at].to(x.dtype) * (product.scale / 127).to(x.dtype)[:, None]
    return y + x[:, at] @ weight.mT


def _multiply(x: Tensor, codes: Tensor) -> Tensor:
    """[n out] int32 of x [n in] and codes [out in], both int8."""
    if x.is_cuda and len(x) < LEAST_ROWS:
        padded = torch.zeros(LEAST_ROWS, x.shape[1], dtype=x.dtype, device=x.device)
        padded[: len(x)] = x
        return torch._int_mm(padded, codes.t())[: len(x)]
    return torch._int_mm(x, codes.t())


def _in_bf16(x: Tensor, product: Int8Product) -> Tensor:
    """Without a fast integer product: the stored weight in bf16. Accumulates in fp32, as bf16 products do."""
    weight = product.codes.to(torch.bfloat16) * (product.scale / 127).to(torch.bfloat16)[:, None]
    bias = None if product.bias is None else product.bias.to(torch.bfloat16)
    return F.linear(x.to(torch.bfloat16), weight, bias).to(x.dtype)


class _Steps(NamedTuple):
    """The passes around the integer product.

    compiled    are they?
    quantise    x [n in] -> codes int8, scale [n 1] fp32: x ~ codes * scale / 127
    cast        x, step -> codes
    scale_back  sums int32 [n out], scale [n 1], weight scale [out], bias, x -> y in x's dtype
    """

    compiled: bool
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    cast: Callable[[Tensor, Tensor], Tensor]
    scale_back: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float()
    return (x.float() * (127 / scale.clamp(min=1e-30))).round().to(torch.int8), scale


def _cast(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).round().to(torch.int8)


def _scale_back(sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y = sums.float() * (scale * (1 / 127**2)) * weight_scale
    return (y if bias is None else y + bias).to(x.dtype)


@cache
def _steps(compiled: bool) -> _Steps:
    if not compiled:
        return _Steps(False, _quantise, _cast, _scale_back)
    made: list[Any] = [torch.compile(step, dynamic=True) for step in (_quantise, _cast, _scale_back)]
    return _Steps(True, *made)


_EAGER: ContextVar[bool] = ContextVar("tfast_int8_eager", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, the steps around the integer product run as they are written: for a few rows, compiling takes longer."""
    token = _EAGER.set(True)
    try:
        yield
    finally:
        _EAGER.reset(token)


def way_of(device: str) -> str:
    """ "compiled", "eager" or "bf16", see `_way_of`."""
    way = _way_of(device)
    return "eager" if way == "compiled" and _EAGER.get() else way


@cache
def _way_of(device: str) -> str:
    """How products run on this machine, said once in the log where it is not in integers: "compiled", "eager" (CUDA,
    where the steps are kernels anyway) or "bf16"."""
    if device == "cuda":
        return "eager"
    reason = None
    if device != "cpu":
        reason = f"there is no integer product on {device}"
    elif torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AMX"):
        reason = f"this CPU has no fast integer product ({torch.backends.cpu.get_cpu_capability()}, AVX512 is needed)"
    elif not has_compiler():
        reason = "there is no C++ compiler (g++ or clang++), and the steps around the integer product are slow without"
    if reason is None:
        return "compiled"
    logger.warning("int8 feed-forwards multiply in bf16: %s", reason)
    return "bf16"


@cache
def has_compiler() -> bool:
    """Can torch.compile make code for the CPU here?"""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
