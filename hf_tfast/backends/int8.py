"""Products of rows with an int8 weight: quantise the rows, multiply integers, scale back, each step in one pass.

On a CPU the integer product is `torch._int_mm`, which runs on AVX-512's VNNI; the steps around it are C, compiled on
first use. oneDNN's prepacked product (`torch.ops.onednn.qlinear_pointwise`) is no faster at any number of rows, and
with signed activations it falls back on a reference that takes seconds. On CUDA `torch._int_mm` is cuBLASLt's.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .int8_steps import ACTIVATIONS, Eager, Layer, Native, Steps, activated
from .native import CannotCompile

__all__ = ["ACTIVATIONS", "Int8Product", "int8_feed_forward", "int8_linear", "uncompiled", "way_of"]

logger = logging.getLogger(__name__)

ROWS = 512


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


@torch.compiler.disable  # addresses of tensors go to C
def _product(x: Tensor, product: Int8Product, step: Tensor | None) -> Tensor:
    way = way_of(x.device.type)
    if way == "bf16":
        return _in_bf16(x, product)
    steps = _steps(way)

    def run(x: Tensor, y: Tensor) -> None:
        whole = None if step is None else _Rows(*steps.quantise(x, step.detach().to(x)))
        rows = whole or _rows(x, product.threshold, steps)
        steps.scale_back(_sums(rows, product, steps), rows.scale, y)

    return _by_rows(x, len(product.codes), steps, run)


def _by_rows(x: Tensor, out: int, steps: Steps, run: Callable[[Tensor, Tensor], None]) -> Tensor:
    """[n out]: a few hundred rows at a time on a CPU, so that what lies between two steps stays in its cache."""
    y = x.new_empty(len(x), out)  # not parts put together: each is written where it belongs
    parts = 1 if x.is_cuda else max(-(-len(x) // ROWS), 1)
    for rows, to in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        if len(rows):
            run(rows, to)
    steps.release()
    return y


class _Rows(NamedTuple):
    """Rows as a product reads them: codes [n in], scale [n 1]; the columns `at` that hold a large number have codes 0
    and are multiplied as they are, `large` [n len(at)]."""

    codes: Tensor
    scale: Tensor
    at: Tensor | None = None
    large: Tensor | None = None


def _rows(x: Tensor, threshold: float, steps: Steps) -> _Rows:
    codes, scale = steps.quantise(x)
    return _without(x, scale, threshold, steps) if _has_large(scale, threshold) else _Rows(codes, scale)


def _has_large(scale: Tensor, threshold: float) -> bool:
    return bool(threshold) and scale.max().item() >= threshold


def _without(x: Tensor, scale: Tensor, threshold: float, steps: Steps) -> _Rows:
    """Columns that hold a large number are set aside; the others are rounded without them."""
    loud = x[scale[:, 0] >= threshold]  # as a rule few rows
    at = (loud.abs() >= threshold).any(0).nonzero()[:, 0]
    return _Rows(*steps.quantise(x.index_fill(1, at, 0)), at, x[:, at])


def _sums(rows: _Rows, product: Int8Product, steps: Steps, place: int = 0) -> Layer:
    more = None
    if rows.at is not None and rows.large is not None:
        weight = product.codes[:, rows.at].float() * (product.scale / 127)[:, None]
        more = rows.large.float() @ weight.mT
    return Layer(steps.multiply(rows.codes, product.codes, place), product.scale, product.bias, more)


@torch.compiler.disable
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
        y = _in_bf16(activated([_in_bf16(flat, up) for up in ups], activation, parts), down)
        return y.view(*x.shape[:-1], len(down.codes))
    steps = _steps(way)

    def run(x: Tensor, y: Tensor) -> None:
        rows = _rows(x, ups[0].threshold, steps)
        layers = [_sums(rows, up, steps, place) for place, up in enumerate(ups)]
        codes, scale, h = steps.middle(layers, rows.scale, activation, parts)
        inner = _Rows(codes, scale)
        if _has_large(scale, down.threshold):
            if h is None:
                _, _, h = steps.middle(layers, rows.scale, activation, parts, keep=True)
            torch._check(h is not None)
            inner = _without(h, scale, down.threshold, steps)  # type: ignore[arg-type]
        steps.scale_back(_sums(inner, down, steps), inner.scale, y)

    return _by_rows(flat, len(down.codes), steps, run).view(*x.shape[:-1], len(down.codes))


def _in_bf16(x: Tensor, product: Int8Product) -> Tensor:
    """Without a fast integer product: the stored weight in bf16. Accumulates in fp32, as bf16 products do."""
    weight = product.codes.to(torch.bfloat16) * (product.scale / 127).to(torch.bfloat16)[:, None]
    bias = None if product.bias is None else product.bias.to(torch.bfloat16)
    return F.linear(x.to(torch.bfloat16), weight, bias).to(x.dtype)


@cache
def _steps(way: str) -> Steps:
    return Native() if way == "compiled" else Eager()


_EAGER: ContextVar[bool] = ContextVar("tfast_int8_eager", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, the steps around the integer product are torch's own operations, one after the other."""
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
    else:
        try:
            _steps("compiled")
        except CannotCompile as error:
            reason = f"{error}, and the steps around the integer product are slow without"
    if reason is None:
        return "compiled"
    logger.warning("int8 feed-forwards multiply in bf16: %s", reason)
    return "bf16"
