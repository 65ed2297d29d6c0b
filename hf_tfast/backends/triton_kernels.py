"""Kernels in Triton: loaded when one is used, refused with the reason where there are none, and their gradients.

Each lies in a file of its own beside this one, and is loaded by name: nothing here needs Triton to be installed, and
code that a model carries as one file finds them in the installed package or says that it is missing.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["forward_by", "kernel", "why_not"]

INTERPRETER = "TRITON_INTERPRET"  # Triton's own switch: kernels run in Python, on any device, for tests


def kernel(name: str) -> Any:
    """The module of a kernel. ValueError where it cannot be loaded."""
    try:
        return import_module(f"hf_tfast.backends.{name}")
    except ImportError as error:
        raise ValueError(f"the kernel {name} cannot be loaded ({error}): pip install hf_tfast triton") from error


def why_not(q: Tensor) -> str | None:
    """Why kernels in Triton cannot run on such tensors; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if q.device.type != "cuda" and os.environ.get(INTERPRETER) != "1":
        return f"kernels in Triton run on CUDA only; these tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "kernels in Triton compute in fp32; these tensors are float64"
    if find_spec("hf_tfast") is None:
        return "the kernels lie in the package hf_tfast, which is not installed: pip install hf_tfast"
    return None


def forward_by(
    run: Callable[[], Tensor],
    again: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """`run()`, whose gradient is that of `again(q, k, v, sinks)`: the same numbers by differentiable operations, which
    are only computed when a gradient is asked for."""
    return _ForwardBy.apply(q, k, v, sinks, run, again)


class _ForwardBy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, run: Callable[[], Tensor], again: Any
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)  # type: ignore[arg-type]
        ctx.again = again  # type: ignore[attr-defined]
        return run()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor) -> tuple[Tensor | None, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        with torch.enable_grad():
            given = [x if x is None else x.detach().requires_grad_(on) for x, on in zip(saved, wanted, strict=True)]
            o = ctx.again(*given)  # type: ignore[attr-defined]
        reached = [x for x in given if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(o, reached, do))
        return (*(next(found) if x is not None and x.requires_grad else None for x in given), None, None)
