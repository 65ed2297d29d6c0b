"""A whole int8 feed-forward in one go, so that the steps between its two products are one pass over memory.

The module that owns the layers keeps its class, children and names, and gains a forward that computes the whole when
that is the same: in inference on a CPU, with all layers in their places. Otherwise it steps aside: for training, where
PEFT has wrapped a layer, and on CUDA, where bitsandbytes' own kernels compute each layer.

    one module      down(act(up(x))): Llama, GPT-2, DistilBERT, T5, ViT, ModernBERT, Phi-3, TFast
    two modules     BERT's intermediate.dense and output.dense: the first computes the whole and marks it, and the
                    layer down hands what is marked through
    none            BART, OPT, Whisper, where the layers belong to a block that does much else: each layer by itself
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import int8 as backend
from ..backends.int8 import int8_feed_forward
from ._base import Block

_KINDS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
}
_NAMES = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")


def kind_of(act: Any) -> str | None:
    """The name in ACTIVATIONS of an activation module, None for any other."""
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _KINDS.get(type(act).__name__)


class FusedInt8(nn.Module):
    """Mixed into the class of the module that owns the layers. `fused`: (names of its layers up, the module that owns
    the layer down, name of that there, activation, parts); outside the registered children, in a tuple."""

    fused: tuple[tuple[str, ...], nn.Module, str, str, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self.is_whole(args[0]):
            return self.whole(args[0])
        return super().forward(*args, **kwargs)

    def is_whole(self, x: Any) -> bool:
        """Would the plain forward compute down(act(up(x))) of these very layers, without a gradient or dropout?"""
        names, owner, down, _, _ = self.fused
        layers = [*(self._modules[name] for name in names), owner._modules[down]]
        free = isinstance(x, Tensor) and not x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad)
        drops = self.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.children())
        return free and not drops and not torch.is_autocast_enabled(x.device.type) and all(map(_untouched, layers))

    def whole(self, x: Tensor) -> Tensor:
        names, owner, down, activation, parts = self.fused
        last: Any = owner._modules[down]
        ups: list[Any] = [self._modules[name] for name in names]
        y = int8_feed_forward(x, [up.product for up in ups], last.product, activation, parts)
        if owner is not self:
            y.tfast_whole = True  # type: ignore[attr-defined]
        return y


def _untouched(module: Any) -> bool:
    from .int8 import int8_layer

    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) is int8_layer() and not hooks


_CLASSES: dict[type, type] = {}


def _fused_class(plain: type) -> type:
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"Int8{plain.__name__}", (FusedInt8, plain), {"__module__": plain.__module__})
    return _CLASSES[plain]


def fuse(block: Block) -> bool:
    """Let the owner of the block's layers compute the whole. False, with nothing changed, where it is not known to be
    that: its structure, and then its outputs on a few numbers, must be those of a plain feed-forward."""
    owners = [path.rpartition(".") for path in block.paths]
    first, last = (block.model.get_submodule(owner[0]) for owner in (owners[0], owners[-1]))
    if isinstance(first, FusedInt8):
        return True
    names, layers = [name for *_, name in owners], [block.get(path) for path in block.paths]
    kinds = [kind for name in _NAMES if (kind := kind_of(getattr(first, name, None))) is not None]
    own = {name for name, child in first.named_children() if any(True for _ in child.parameters())}
    mine = set(names if first is last else names[:-1])
    if len(kinds) != 1 or own != mine or not all(map(_untouched, layers)):
        return False
    plain = type(first)
    first.__dict__["fused"] = (tuple(names[:-1]), last, names[-1], kinds[0], block.parts)
    first.__class__ = _fused_class(plain)
    if _agrees(first, plain, layers[-1]):
        return True
    unfuse(first)
    return False


def unfuse(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, FusedInt8):
        module.__class__ = type(module).__mro__[2]
        del module.__dict__["fused"]


def _agrees(module: Any, plain: type, down: Any) -> bool:
    """Do the plain forward and the whole give the same on a few rows?"""
    up = module._modules[module.fused[0][0]]
    x = torch.linspace(-2, 2, 4 * up.in_features, device=up.weight.device, dtype=torch.float32).sin().view(4, -1)
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), backend.uncompiled():
            whole = module.whole(x)
            y = plain.forward(module, x)  # type: ignore[attr-defined]
            if module.fused[1] is not module:
                y = down(y)
    finally:
        module.train(training)
    return whole.shape == y.shape and bool((whole - y).norm() <= 0.02 * y.norm())
