"""The integer product and the passes around it: rows to codes, codes to sums, sums to activations or outputs.

Eager is torch, an operation after the other; Native is C, one pass each, see int8_steps.c.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from . import native
from .scratch import Scratch

TINY = 1e-30
KEPT = 2**23  # bytes of a tensor that outlives its pass, at most: the sums of 512 rows, 4096 wide
LEAST_ROWS = 17  # cuBLASLt multiplies no fewer


class Layer(NamedTuple):
    """What a layer gives before it is scaled: sums [n width] int32, the weight's scale [width] fp32; bias [width] and
    `more` [n width] fp32 are added where they are not None."""

    sums: Tensor
    scale: Tensor
    bias: Tensor | None
    more: Tensor | None = None


class Steps(Protocol):
    """scale is [n 1] fp32 everywhere: x ~ codes * scale / 127. Codes and sums may lie in memory that is used again:
    they hold until codes are next made in the same place, or a product of the same place."""

    def quantise(self, x: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [n k] -> codes int8, scale; with a `step`, x is whole multiples of it."""
        ...

    def multiply(self, x: Tensor, codes: Tensor, place: int = 0) -> Tensor:
        """x [n in] int8, codes [out in] int8 -> sums [n out] int32."""
        ...

    def middle(
        self, layers: Sequence[Layer], scale: Tensor, act: str, parts: int, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Layers up, of rows with `scale` -> codes and scale of the inner activations; those too where `keep`."""
        ...

    def scale_back(self, layer: Layer, scale: Tensor, y: Tensor) -> None:
        """Layer of rows with `scale` -> y [n width], in place."""
        ...

    def release(self) -> None:
        """Give large memory back: what codes and sums were made holds no longer."""
        ...


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in the order of the C
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "relu": F.relu,
    "silu": F.silu,
}


def activated(ys: Sequence[Tensor], act: str, parts: int) -> Tensor:
    """Outputs of one layer up, of a gate and a layer, or of both side by side -> the inner activations."""
    if parts > 1:
        ys = ys[0].chunk(parts, -1)
    gate = ACTIVATIONS[act](ys[0])
    return gate if len(ys) == 1 else gate * ys[1]


class Eager:
    def quantise(self, x: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if step is not None:
            return (x / step).round().to(torch.int8), _scale_of(step, len(x))
        scale = x.abs().amax(1, keepdim=True).float()
        return (x.float() * (127 / scale.clamp(min=TINY))).round().to(torch.int8), scale

    def multiply(self, x: Tensor, codes: Tensor, place: int = 0) -> Tensor:
        if x.is_cuda and len(x) < LEAST_ROWS:
            padded = torch.zeros(LEAST_ROWS, x.shape[1], dtype=x.dtype, device=x.device)
            padded[: len(x)] = x
            return torch._int_mm(padded, codes.t())[: len(x)]
        return torch._int_mm(x, codes.t())

    def middle(
        self, layers: Sequence[Layer], scale: Tensor, act: str, parts: int, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        h = activated([self._outputs(layer, scale) for layer in layers], act, parts)
        return (*self.quantise(h), h)

    def scale_back(self, layer: Layer, scale: Tensor, y: Tensor) -> None:
        y.copy_(self._outputs(layer, scale))

    def release(self) -> None:
        pass

    def _outputs(self, layer: Layer, scale: Tensor) -> Tensor:
        y = layer.sums.float() * (scale * (1 / 127**2)) * layer.scale
        for term in (layer.bias, layer.more):
            y = y if term is None else y + term.float()
        return y


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sums", "scale", "bias", "more")),
        ("stride", ctypes.c_long),
    ]


class _Room(threading.local):
    """Memory for what lies between two steps, of one thread."""

    def __init__(self) -> None:
        self.take = Scratch(torch.device("cpu"))


class Native:
    """On a CPU. CannotCompile where there is no C."""

    def __init__(self) -> None:
        library, p, n, c = native.load("int8_steps"), ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        layer = ctypes.POINTER(_Layer)
        self._quantise: Any = library.tfast_quantise
        self._quantise.argtypes = [p, n, n, p, p, ctypes.c_float, c]
        self._middle: Any = library.tfast_middle
        self._middle.argtypes = [layer, layer, p, n, n, c, p, c, p, p, c]
        self._scale_back: Any = library.tfast_scale_back
        self._scale_back.argtypes = [layer, p, n, n, p, c]
        for function in (self._quantise, self._middle, self._scale_back):
            function.restype = None
        self._room = _Room()

    def quantise(self, x: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = _plain(x)
        codes = self._room.take("codes", tuple(x.shape), torch.int8)
        scale = torch.empty(len(x), 1) if step is None else _scale_of(step, len(x))
        size = 0.0 if step is None else float(step)
        self._quantise(x.data_ptr(), *x.shape, codes.data_ptr(), scale.data_ptr(), size, torch.get_num_threads())
        return codes, scale

    def multiply(self, x: Tensor, codes: Tensor, place: int = 0) -> Tensor:
        sums = self._room.take(f"sums {place}", (len(x), len(codes)), torch.int32)
        return torch._int_mm(x, codes.t(), out=sums)

    def middle(
        self, layers: Sequence[Layer], scale: Tensor, act: str, parts: int, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        n, width = layers[0].sums.shape
        inner, threads = width // parts, torch.get_num_threads()
        held = [_held(layer) for layer in layers]
        sides = [_side(layer) for layer in held] if parts == 1 else [_side(held[0], inner * m) for m in range(parts)]
        h = torch.empty(n if keep else threads, inner)
        codes, to = self._room.take("inner codes", (n, inner), torch.int8), torch.empty(n, 1)
        self._middle(
            sides[0], sides[1] if len(sides) > 1 else None, scale.data_ptr(), n, inner, list(ACTIVATIONS).index(act),
            h.data_ptr(), keep, codes.data_ptr(), to.data_ptr(), threads,
        )  # fmt: skip
        return codes, to, h if keep else None

    def scale_back(self, layer: Layer, scale: Tensor, y: Tensor) -> None:
        held, out = _held(layer), y if y.dtype == torch.float32 and y.is_contiguous() else torch.empty(y.shape)
        self._scale_back(_side(held), scale.data_ptr(), *out.shape, out.data_ptr(), torch.get_num_threads())
        if out is not y:
            y.copy_(out)

    def release(self) -> None:
        room = self._room.take
        room.held = {name: x for name, x in room.held.items() if x.nbytes <= KEPT}


def _scale_of(step: Tensor, rows: int) -> Tensor:
    return (step.float() * 127).expand(rows, 1).contiguous()


def _plain(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _held(layer: Layer) -> Layer:
    """With tensors as C reads them; the caller keeps them alive."""
    bias = torch.zeros_like(layer.scale) if layer.bias is None else layer.bias
    more = None if layer.more is None else _plain(layer.more)
    return Layer(layer.sums, _plain(layer.scale), _plain(bias), more)


def _side(layer: Layer, first: int = 0) -> _Layer:
    """Addresses, from column `first` on."""
    at = [None if each is None else each.data_ptr() + 4 * first for each in layer]
    return _Layer(*at, layer.sums.shape[1])
