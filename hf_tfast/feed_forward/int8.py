"""Int8: the linear layers of a feed-forward store and multiply 8-bit integers (LLM.int8).

    y_o = (sum_i X_i W_oi) s s_o / 127^2 + bias_o,   X = round(127 x / s),  s = max |x| of the row; W, s_o likewise
    columns in which some |x_i| >= threshold are taken out of X and multiplied as they are, with the stored W

Shapes   x [.. in]   ->   [.. out]
Cost     in out bytes and 4 out of scales: half of fp16. Time as integer matrix multiplication: on CUDA that of
         bitsandbytes' own kernels; on a CPU with AVX-512 and a C compiler for the steps around it that of torch's
         integer product; else it is said once, and the layer multiplies in bf16.
Exact    a weight is off by at most half a step, s_o / 254, and so is a row of x; no gradient reaches the weights.
Source   Dettmers et al., "LLM.int8()", sections 2.1 and 3, https://arxiv.org/abs/2208.07339
Differs  each layer is a bitsandbytes Linear8bitLt, whose own CPU path runs every elementwise step apart and, in
         training, multiplies dequantised weights: here both compute the same numbers, and gradients pass the rounding
         of x as if it were the identity.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backends.int8 import Int8Product, int8_linear
from ._base import Block, Form, Size, bias_of, check_finite, is_linear, weight_of
from ._fused import fuse
from ._moments import Moments
from .activation import ActivationQuantized, step_of

MISSING = 'int8 feed-forwards need bitsandbytes: pip install "hf_tfast[int8]"'


@dataclass(frozen=True, kw_only=True)
class Int8(Form):
    """`threshold` from which a column of activations is not rounded; 0 rounds all. 6 is the paper's."""

    name: ClassVar[str] = "int8"
    order: ClassVar[int] = 3

    threshold: float = 6.0

    @property
    def from_shapes(self) -> bool:
        return False

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, float | int) or not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be a number of at least 0, got {self.threshold!r}")

    def apply(self, block: Block, size: Size | None = None, moments: dict[str, Moments] | None = None) -> Size:
        made = int8_layer()
        for path in block.paths:
            module = block.get(path)
            if not any(is_linear(child) for child in module.modules()):
                weight_of(module, path)  # raises, and names the layer
        for path, layer in list(block.linears()):
            weight, bias = weight_of(layer, path).detach(), bias_of(layer)
            check_finite(weight, path)
            block.replace(path, made(weight, bias, float(self.threshold)))
        for module in [each for path in block.paths for each in block.get(path).modules()]:
            if isinstance(module, ActivationQuantized) and step_of(module.levels) is not None:
                module.integers = True  # its codes go straight into the product
        return dict.fromkeys(block.paths, "int8")

    def finish(self, block: Block) -> None:
        for _, module in block.model.named_modules():
            if isinstance(module, int8_layer()):
                module.settle()
        fuse(block)


@cache
def int8_layer() -> Any:
    """The class of the layers, made when bitsandbytes is first needed. ImportError names the extra."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError(MISSING) from error

    class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
        """x [.. in] -> [.. out] with weight [out in] int8 and its scales SCB [out] fp32 as a buffer, which are the
        names of bitsandbytes' own checkpoints. PEFT takes it for what it is, and may merge into it."""

        def __init__(self, weight: Tensor, bias: Tensor | None, threshold: float) -> None:
            super().__init__(
                weight.shape[1], weight.shape[0], bias is not None, False, threshold=threshold, device="meta"
            )
            codes, scale = Int8Product.quantise(weight)
            self._hold(codes, scale)
            if bias is not None:
                self.bias = nn.Parameter(bias, requires_grad=False)

        def _hold(self, codes: Tensor, scale: Tensor) -> None:
            """Take codes [out in] int8 and scales [out] fp32, in all the places where bitsandbytes looks for them."""
            self.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
            self.SCB: Tensor
            self.register_buffer("SCB", scale)
            self.state.CB, self.state.SCB = self.weight.data, scale

        def settle(self) -> None:
            """After a load or a merge has put another weight into this layer, take over its codes and scales."""
            fresh = getattr(self.weight, "SCB", None)
            if not isinstance(self.weight, bnb.nn.Int8Params) or self.state.SCB is not self.SCB or fresh is not None:
                scale = self.SCB if fresh is None else fresh
                self._hold(self.weight.data, scale.float().flatten())

        def init_8bit_state(self) -> None:
            self.settle()

        def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
            scale: Any = self._buffers.pop("SCB")
            super()._apply(fn, recurse)
            moved = fn(scale)  # to another device, but in full precision: a cast would change the weights
            self._hold(self.weight.data, moved if moved.dtype == scale.dtype else scale.to(moved.device))
            return self

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            self.settle()
            nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            state_dict.pop(f"{prefix}weight_format", None)  # of bitsandbytes' own checkpoints, always row-major
            nn.Linear._load_from_state_dict(self, state_dict, prefix, *args)
            self.settle()

        def dequantised(self) -> Tensor:
            """[out in] fp32: what the codes stand for."""
            self.settle()
            return self.weight.data.float() * (self.SCB / 127)[:, None]

        def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
            """x [.. in]; with `step`, x is a multiple of it in whole numbers of int8."""
            if getattr(x, "tfast_whole", False):
                del x.tfast_whole  # type: ignore[attr-defined]
                return x  # the whole feed-forward has been computed in front of this layer, see _fused.py
            if x.is_cuda and step is None:
                return self.stock(x)
            return int8_linear(x, self.product, step)

        def stock(self, x: Tensor) -> Tensor:
            """bitsandbytes' own forward pass."""
            self.settle()
            return super().forward(x)

        @property
        def product(self) -> Int8Product:
            _refuse_trace()
            self.settle()
            return Int8Product(self.weight.data, self.SCB, self.bias, self.state.threshold)

    return Int8Linear


def _refuse_trace() -> None:
    if torch.compiler.is_exporting():
        raise ValueError(
            "torch.export cannot trace int8 feed-forwards: export hf_tfast.dequantise(model); what runs the "
            "program may quantise it"
        )
