"""Stamps: what an attention module is told to compute, and the note of what it last ran.

A plan sits on the top config, while attention modules hold sub-configs and layer numbers that are missing, None or
shared between stacks. So applying a plan walks the model once and stamps every attention module; the dispatcher reads
the stamp and nothing else. Both are plain attributes of the module: they survive deepcopy, pickle and `.to`.

    stamp_of(module)  -> Stamp or None        what to compute
    last_run(module)  -> Ran or None          what the dispatcher did in the last call
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..attention import Mechanism

__all__ = ["NAME", "Ran", "Stamp", "last_run", "note", "stamp_of", "stamped_modules"]

NAME = "tfast"  # the implementation and the quantisation method
_STAMP, _RAN = "_tfast_stamp", "_tfast_ran"


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What one attention module computes.

    path        the module's name in the model it was stamped in, "model.layers.3.self_attn".
    stack       "text", "encoder", "decoder", "vision", ...: the stacks count their layers apart.
    layer       number of the layer in its stack, from 0.
    kind        "self" or "cross"; cross-attention is always dense.
    mechanism   what self-attention computes; Dense() where the plan names nothing.
    dense       the implementation that dense layers run: "sdpa" or "eager".
    heads       query heads of the layer, of all tensor-parallel ranks together.
    rank        this process's tensor-parallel rank: seeded draws are by global head.
    """

    path: str
    stack: str
    layer: int
    kind: str
    mechanism: Mechanism
    dense: str = "sdpa"
    heads: int | None = None
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What the dispatcher did in a module's last call.

    mechanism   what was computed: the planned one, or its intersection with the model's own sliding window.
    backend     the path that ran: "torch", "reference", "sdpa", "eager", "dense mask", ...
    queries, keys, causal, heads, width   of that call; width is that of a key plus that of a value.
    """

    mechanism: Mechanism
    backend: str
    queries: int
    keys: int
    causal: bool
    heads: int
    width: int


def stamp_of(module: nn.Module) -> Stamp | None:
    return getattr(module, _STAMP, None)


def set_stamp(module: nn.Module, stamp: Stamp | None) -> None:
    """Stamp a module; None takes stamp and note away."""
    for name in (_STAMP, _RAN):
        if hasattr(module, name):
            delattr(module, name)
    if stamp is not None:
        setattr(module, _STAMP, stamp)


def stamped_modules(model: nn.Module) -> list[tuple[nn.Module, Stamp]]:
    """The stamped attention modules of a model, in the order of `named_modules`."""
    return [(module, stamp) for module in model.modules() if (stamp := stamp_of(module)) is not None]


def last_run(module: nn.Module) -> Ran | None:
    return getattr(module, _RAN, None)


def note(module: nn.Module, ran: Ran) -> None:
    """Remember a call; what torch.export records is none, and its lengths may be open."""
    if not torch.compiler.is_exporting():
        setattr(module, _RAN, ran)
