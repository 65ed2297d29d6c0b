"""Modules whose sequence other processes hold the rest of: where attention goes instead of `hf_tfast.attend`.

`hf_tfast.parallel` puts a `Shared` on every attention module; the dispatcher asks for it and knows nothing else of it.
"""

from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Shared", "sequence_of", "set_sequence"]

_SEQUENCE = "_tfast_sequence"


class Shared(Protocol):
    """What a sequence over several processes offers a module. `layer` gives, for the row of a call's mask, an object
    in the manner of OwnLayer: seen, span, fit, attend and expected."""

    def layer(self, row: Tensor | None) -> Any: ...


def sequence_of(module: nn.Module) -> Shared | None:
    return getattr(module, _SEQUENCE, None)


def set_sequence(module: nn.Module, shared: Shared | None) -> None:
    """Let attention of this module go over several processes; None takes that back."""
    if shared is not None:
        setattr(module, _SEQUENCE, shared)
    elif hasattr(module, _SEQUENCE):
        delattr(module, _SEQUENCE)
